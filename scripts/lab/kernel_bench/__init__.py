"""Time, bytes and bandwidth of the kernels."""
