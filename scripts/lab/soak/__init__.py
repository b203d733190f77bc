"""Thousands of OpenAI requests at a server: what it answers, holds and leaves behind."""
