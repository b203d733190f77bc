"""Eviction and codebooks at equal bytes, and the time of a decode step with one."""
