"""What compression inside prompts costs in right answers, against compression at their end.

lab/prompt_marks.py says more; --help lists the options.
"""

import sys

from lab.prompt_marks import main

if __name__ == "__main__":
    sys.exit(main())
