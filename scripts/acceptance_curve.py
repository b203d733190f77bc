"""How many drafts over a compressed view are accepted, by budget and policy.

lab/speculation/acceptance_curve.py says more; --help lists the options.
"""

import sys

from lab.speculation.acceptance_curve import main

if __name__ == "__main__":
    sys.exit(main())
