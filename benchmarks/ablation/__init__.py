"""What each part, ratio, pruner and schedule is worth: `python -m benchmarks.ablation`."""
