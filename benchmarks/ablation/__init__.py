"""`python -m benchmarks.ablation`: what each part, ratio, pruner and schedule is worth."""
