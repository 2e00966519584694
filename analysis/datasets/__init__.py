"""Queries and data sets: shipped, public, or the user's own."""
