"""Write the tables of docs/compatibility.md and docs/model-classes.md.

lab/compatibility/command.py says more.
"""

import sys

from lab.compatibility.command import main

if __name__ == "__main__":
    sys.exit(main())
