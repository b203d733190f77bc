"""Drafts over a compressed view: speed, and how many are accepted."""
