"""Drafts over a compressed view next to n-gram drafts and none.

lab/speculation/command.py says more; --help lists the options.
"""

import sys

from lab.speculation.command import main

if __name__ == "__main__":
    sys.exit(main())
