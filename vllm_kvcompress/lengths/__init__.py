"""Arithmetic of budgets, blocks and bytes: no torch, no vLLM."""
