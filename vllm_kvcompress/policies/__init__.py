"""Eviction policies, one file each. See ``base.py`` for the interface."""
