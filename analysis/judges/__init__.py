"""Judges: the text of a response to a verdict, refused or not."""
