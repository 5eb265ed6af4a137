"""What both entries need: configuration, processes, files, provenance. Knows no model, attack or data."""
