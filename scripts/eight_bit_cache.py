"""Survivors and answers over a cache of 8 bits, held against those over one in the model's type.

lab/eight_bit_cache.py says more; --help lists the options.
"""

import sys

from lab.eight_bit_cache import main

if __name__ == "__main__":
    sys.exit(main())
