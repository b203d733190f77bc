"""Print the figures that docs/results.md quotes, from real runs of the engine.

lab/figures.py says more; --help lists the options.
"""

import sys

from lab.figures import main

if __name__ == "__main__":
    sys.exit(main())
