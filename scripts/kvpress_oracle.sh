#!/usr/bin/env bash
# Run kvpress on the needle task and write its answers as test data (see kvpress_oracle.py).
#
# Usage: scripts/kvpress_oracle.sh [VENV [ARGUMENTS OF kvpress_oracle.py ...]]
#
# VENV (default .venv-oracle) is made if it is missing. It is separate from the project's own
# environment because kvpress needs an older transformers than vLLM. Relative paths start at the
# repository root. PYTHON (default python3) names the interpreter that makes the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${1:-.venv-oracle}"
shift || true

if [[ ! -x "$venv/bin/python" ]]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet kvpress==0.5.5 torch==2.13.0 transformers==5.2.0
# Nothing here needs these, and a build that does not match torch breaks "import transformers".
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
exec "$venv/bin/python" scripts/kvpress_oracle.py "$@"
