"""`dualspeed bench`: times, operations and memory of training steps, measured side by side."""
