"""Readouts: first-token logits to a refuse/comply margin."""
