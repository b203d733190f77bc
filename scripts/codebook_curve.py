"""Eviction and codebooks at equal bytes on the needle task.

lab/codebook/curve_command.py says more; --help lists the options.
"""

import sys

from lab.codebook.curve_command import main

if __name__ == "__main__":
    sys.exit(main())
