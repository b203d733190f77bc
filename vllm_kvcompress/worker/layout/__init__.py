"""How one layer's cache lies in memory."""
