"""Benchmarks: `python -m benchmarks NAME`. Each module beside this one with a `main` is one."""
