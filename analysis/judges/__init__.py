"""Judges: turn the text of a response into a verdict, refused or not."""
