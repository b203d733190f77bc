"""Which of vLLM's model classes for text generation are accepted: one column of a table.

lab/model_classes.py says more.
"""

import sys

from lab.model_classes import main

if __name__ == "__main__":
    sys.exit(main())
