"""Benchmarks: everything that is compared runs side by side in one process, and is quoted as a ratio."""
