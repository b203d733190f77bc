"""Stock vLLM against the plugin, in turns, over the same requests.

lab/serving/command.py says more; --help lists the options.
"""

import sys

from lab.serving.command import main

if __name__ == "__main__":
    sys.exit(main())
