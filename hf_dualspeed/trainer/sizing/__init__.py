"""How large a micro-batch is: measured on a few steps before the first one, told, and chosen where it is "auto"."""
