"""Work on paged KV caches: Triton kernels, what a CPU runs in their place, and policies' formulas.

Imported as ``vllm_kvcompress.kernels``. Nothing here knows vLLM or the configuration.
"""
