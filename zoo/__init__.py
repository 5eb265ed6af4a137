"""Models from names and weights files."""
