"""Torch versions of the Triton kernels: same names, same signatures, same answers.

They are what a CPU runs, and what a benchmark of a kernel is compared with.
"""
