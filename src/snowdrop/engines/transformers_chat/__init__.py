"""Packed as the code of a revision."""
