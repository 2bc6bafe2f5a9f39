"""One module per subcommand of `dualspeed`: options and output."""
