"""Benchmarks: each script prints a table. `--quick` makes a small run, `--json FILE` writes the figures to a file."""
