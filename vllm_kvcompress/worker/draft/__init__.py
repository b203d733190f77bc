"""Drafting over compressed views."""
