"""Measuring compressed models: tasks, runners and reports."""
