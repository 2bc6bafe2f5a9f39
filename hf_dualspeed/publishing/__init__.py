"""Publishes a run: its record (results.json), model card, plots and repo on the Hub."""
