"""Figures: tables in, matplotlib axes and captions out; nothing here knows a model."""
