"""Figures: tables in, matplotlib axes and captions out; nothing here depends on a model."""
