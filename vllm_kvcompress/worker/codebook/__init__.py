"""Survivors stored as entries of a codebook and codes."""
