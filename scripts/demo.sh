#!/usr/bin/env bash
# Serve a small model with its KV cache compressed, and ask it for numbers hidden in long prompts.
# Arguments go to scripts/demo.py (--help lists them).
set -euo pipefail
top="$(dirname "${BASH_SOURCE[0]}")/.."

"$top/scripts/setup.sh" eval
exec "$top/.venv/bin/python" "$top/scripts/demo.py" "$@"
