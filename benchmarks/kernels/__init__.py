"""The program `python -m benchmarks.kernels`; `__main__` says what it does."""
