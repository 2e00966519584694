"""Queries and the data sets that they come from."""
