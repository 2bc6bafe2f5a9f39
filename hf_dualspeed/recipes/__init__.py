"""Recipes: trainings from YAML files, and the small models that some of them start from."""
