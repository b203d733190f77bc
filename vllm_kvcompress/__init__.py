"""KV-cache compression for vLLM: a general plugin, a block manager, policies and metrics.

Importing this package imports neither torch nor vllm; the entry points in ``plugin.py`` do.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
