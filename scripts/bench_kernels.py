"""Time, bytes and bandwidth of the kernels, next to a copy of the same run.

lab/kernel_bench/command.py says more; --help lists the options.
"""

import sys

from lab.kernel_bench.command import main

if __name__ == "__main__":
    sys.exit(main())
