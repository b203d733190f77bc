"""Evaluation tasks: each module makes prompts and says which answers are right."""
