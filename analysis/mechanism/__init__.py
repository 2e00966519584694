"""Locate the effect of a defense in the network: layers, components, directions and interventions."""
