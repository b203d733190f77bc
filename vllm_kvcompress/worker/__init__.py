"""The model's side. Imports nothing of ``core``; plans come in as plain data."""
