#!/usr/bin/env bash
# Install SlotMamba with the tested versions into .venv, which is made if it is not there.
#
#   scripts/install.sh          what training needs
#   scripts/install.sh dev      with an extra; several are separated by commas
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: SlotMamba needs Python 3.11 or newer; ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2>/dev/null || echo "not there"). Name another with PYTHON=..." >&2
    exit 1
}

if [ ! -x .venv/bin/pip ]; then
    python="$(find_python)"
    # A half-made .venv would pass for a good one the next time.
    "$python" -m venv .venv || { rm -rf .venv; exit 1; }
fi

# On Linux the package index offers torch with 3 GB of CUDA libraries. A machine without an NVIDIA driver (or WSL's
# /dev/dxg) gets the CPU build of the tested version, from PyTorch's own index unless pip finds it where it looks anyway.
if [ "$(uname)" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && [ ! -e /dev/dxg ]; then
    torch="torch==$(sed -n 's/^torch==//p' constraints.txt)+cpu"
    if ! .venv/bin/pip install --quiet --dry-run --no-deps "$torch" 2>/dev/null; then
        .venv/bin/pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
    fi
fi

.venv/bin/pip install -c constraints.txt -e ".${extras:+[$extras]}"
