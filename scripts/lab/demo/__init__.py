"""The demo: a server, questions, a table."""
