"""Exact answers on the needle task per policy, budget and length.

lab/policy_table.py says more; --help lists the options.
"""

import sys

from lab.policy_table import main

if __name__ == "__main__":
    sys.exit(main())
