"""Grids of experiments, and the questions that they answer."""
