"""Grids of trainings: flags × seeds as data, run side by side, evaluated, and summarised with intervals."""
