"""Tokens as entries of codebooks: building books, coding tokens, attention over codes."""
