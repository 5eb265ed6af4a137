"""Grids of training runs (flags × seeds): run in parallel, evaluated, and summarised with confidence intervals."""
