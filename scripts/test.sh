#!/usr/bin/env bash
# Lint, types, the site of docs/ and tests, all of them whatever fails. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh eval,dev

failed=""
check() {
    echo
    echo "=== $*"
    ".venv/bin/$1" "${@:2}" || failed="$failed${failed:+, }$1 $2"
}

check ruff check
check ruff format --check
# As installed, kernels/ inside the package, so that types are followed from one into the other.
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
cp -r vllm_kvcompress scripts/lab "$tree"
cp -r kernels "$tree/vllm_kvcompress/kernels"
MYPYPATH="$tree" check mypy --config-file pyproject.toml "$tree/vllm_kvcompress" "$tree/lab"
# Into build/, which git ignores. --strict: a dead link fails.
export NO_MKDOCS_2_WARNING=1
check mkdocs build --strict --config-file docs/site/mkdocs.yml
# A vLLM that is only read (about 5 s the first time); without it its tests are skipped.
if [ -z "${KVCOMPRESS_VLLM_SOURCES:-}" ] && sources="$(.venv/bin/python scripts/vllm_sources.py)"; then
    export KVCOMPRESS_VLLM_SOURCES="$sources"
fi
# Engines are bound by one core each. On a GPU they would compete for its memory.
workers=2
if command -v nvidia-smi >/dev/null; then workers=0; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A hundred processes import the same files: whatever the shell says, what is compiled is kept.
unset PYTHONDONTWRITEBYTECODE
# Without a path in the arguments pytest takes tests/ (pyproject.toml).
# Files in the order of tests/order.py: the longest first.
spread=(--numprocesses "$workers" --dist loadfile --no-loadscope-reorder)
check pytest "${spread[@]}" "$@"
# The scheduler's side once more over the Python files of that vLLM, which need no compiled parts;
# without what asks nothing of the host.
if [ "$workers" -gt 0 ] && [ "$#" -eq 0 ] && [ -n "${KVCOMPRESS_VLLM_SOURCES:-}" ]; then
    export KVCOMPRESS_ALLOCATOR_STEPS=10000
    PYTHONPATH="$KVCOMPRESS_VLLM_SOURCES" check pytest "${spread[@]}" tests/core \
        --ignore=tests/core/test_classifier.py --ignore=tests/core/allocator/test_faults.py
fi

echo
if [ -n "$failed" ]; then
    echo "failed: $failed"
    exit 1
fi
echo "all passed"
