"""Scores of cached tokens, measured in place by Triton kernels."""
