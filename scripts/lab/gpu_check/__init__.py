"""The first hour on a GPU: stages, their time limits, and what is written of them."""
