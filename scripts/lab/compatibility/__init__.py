"""docs/compatibility.md: its rows, what the checks say of them, and its tables."""
