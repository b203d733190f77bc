"""A long generation in bounded memory: run it, show it.

lab/long_generation.py says more; --help lists the options.
"""

import sys

from lab.long_generation import main

if __name__ == "__main__":
    sys.exit(main())
