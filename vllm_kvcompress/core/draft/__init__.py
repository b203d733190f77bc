"""Drafting over views, on the scheduler's side. Nothing else in ``core`` knows how it works."""
