"""Tensor operations on paged KV caches: plain torch versions, on CPU and GPU alike.

Imported as ``vllm_kvcompress.kernels``. Nothing here knows vLLM or the configuration.
"""
