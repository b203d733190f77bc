"""Many questions over some texts: each prompt for itself, or each text compressed once for all.

lab/shared_prefix.py says more; --help lists the options.
"""

import sys

from lab.shared_prefix import main

if __name__ == "__main__":
    sys.exit(main())
