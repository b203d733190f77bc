"""Unpack the Python sources of the vLLM that is only read, once.

lab/vllm_sources.py says more.
"""

import sys

from lab.vllm_sources import main

if __name__ == "__main__":
    sys.exit(main())
