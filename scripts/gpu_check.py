"""The first hour on a GPU: one command, stages in order of worth, one table.

lab/gpu_check/command.py says more; --help lists the options.
"""

import sys

from lab.gpu_check.command import main

if __name__ == "__main__":
    sys.exit(main())
