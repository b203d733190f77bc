"""Prefill tokens of every turn of a chat: stock vLLM, compression, and compression with sessions.

lab/chat_turns.py says more; --help lists the options.
"""

import sys

from lab.chat_turns import main

if __name__ == "__main__":
    sys.exit(main())
