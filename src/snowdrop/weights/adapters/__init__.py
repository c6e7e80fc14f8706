"""Frameworks that load weights in ways of their own, fed from a LoadedModel. Each module needs its framework."""
