"""The scheduler's side. Imports no policies, no kernels and nothing of ``worker``."""
