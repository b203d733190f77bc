"""The GPU's path on a CPU: strided cache, Triton kernels through the interpreter. For tests."""
