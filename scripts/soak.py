"""Thousands of OpenAI requests at a server that compresses: answers, memory, books, and its end.

lab/soak/command.py says more; --help lists the options.
"""

import sys

from lab.soak.command import main

if __name__ == "__main__":
    sys.exit(main())
