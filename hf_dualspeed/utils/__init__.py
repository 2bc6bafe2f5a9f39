"""What every package may use; needs nothing of the library, and loads torch only where a module works with it."""
