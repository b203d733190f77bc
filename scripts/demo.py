"""Serve a model with its KV cache compressed, and ask it for hidden numbers.

lab/demo/command.py says more; --help lists the options.
"""

import sys

from lab.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
