"""Tokens of a tiny hybrid model on vLLM beside those of transformers.

lab/hybrid_tokens.py says more.
"""

import sys

from lab.hybrid_tokens import main

if __name__ == "__main__":
    sys.exit(main())
