"""Downloads from the Hub and uploads to it: files are checked, errors are explained."""
