"""What comes from the Hub and goes there: found, checked, explained."""
