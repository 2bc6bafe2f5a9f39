"""`python -m benchmarks.gpu`: all that is measured on one GPU, in nine minutes."""
