"""Training with and without DualSpeed, compared: `python -m benchmarks.compare`."""
