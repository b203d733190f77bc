"""Formulas of policies and models in plain torch, the same on every device."""
