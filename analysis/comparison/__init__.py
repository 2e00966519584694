"""Comparison of several models: runs of each, random effects, order of the defenses, worker processes."""
