"""The record of a run (results.json) as model card, plots and a repo on the Hub."""
