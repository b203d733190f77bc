"""A real model with windowed layers: answers over HTTP, blocks by group, and perplexity.

lab/windowed_model.py says more; --help lists the options.
"""

import sys

from lab.windowed_model import main

if __name__ == "__main__":
    sys.exit(main())
