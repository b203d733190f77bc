"""Time of a decode step with codebooks, without, and with nothing evicted.

lab/codebook/decode_steps.py says more; --help lists the options.
"""

import sys

from lab.codebook.decode_steps import main

if __name__ == "__main__":
    sys.exit(main())
