"""Shared by training and evaluation: configuration, processes, files, provenance. Independent of models, attacks and data."""
