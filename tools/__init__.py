"""Generators of the documentation's tables and pictures."""
