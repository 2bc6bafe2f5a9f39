"""One module for each subcommand of `dualspeed`: its options, and what it prints."""
