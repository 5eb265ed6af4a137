"""Measured claims: each script prints a table; `--quick` for a small run, `--json FILE` to keep the figures."""
