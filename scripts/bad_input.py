"""Bad requests for a real server, made by schemathesis and Hypothesis: lab/bad_input/fuzz.py.

Needs schemathesis, which no test does: pip install schemathesis.
"""

import sys

from lab.bad_input.fuzz import main

if __name__ == "__main__":
    sys.exit(main())
