#!/usr/bin/env bash
# Run kvpress and write its answers as test data: the methods on small models (lab/oracle/parity.py,
# half a minute) and the needle task (lab/oracle/needle.py, longer).
#
# Usage: scripts/kvpress_oracle.sh [VENV [needle|parity [ARGUMENTS OF THAT RUN ...]]]
#
# Without a name, both are run. VENV (default .venv-oracle) is made if it is missing. It is separate
# from the project's own environment because kvpress needs an older transformers than vLLM. Relative
# paths start at the repository root. PYTHON (default python3) names the interpreter that makes the
# environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${1:-.venv-oracle}"
name="${2:-all}"
shift $(($# < 2 ? $# : 2))
case "$name" in
    needle | parity) runs=("$name") ;;
    all) runs=(parity needle) ;;
    *)
        echo "kvpress_oracle.sh: there is no run $name; allowed are needle, parity." >&2
        exit 2
        ;;
esac

if [[ ! -x "$venv/bin/python" ]]; then
    "${PYTHON:-python3}" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet kvpress==0.5.5 torch==2.13.0 transformers==5.2.0
# Nothing here needs these, and a build that does not match torch breaks "import transformers".
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
for run in "${runs[@]}"; do
    # -P: a top-level folder of this repository has the name of a package that transformers imports.
    PYTHONPATH=scripts "$venv/bin/python" -P -m "lab.oracle.$run" "$@"
done
