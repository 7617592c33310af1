# Sourced by the other scripts: makes .venv in the project's folder and installs litpeft into it, with the tested
# versions of constraints.txt. `install_litpeft "[test]"` adds an extra.
#
#   PYTHON=python3.12   the interpreter to use (default python3)
#   CONSTRAINTS=        install the newest versions instead of the tested ones; on Linux that is torch's CUDA build

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
CONSTRAINTS=${CONSTRAINTS-constraints.txt}

install_litpeft() {
    local site=()
    if [ ! -x .venv/bin/python ]; then
        # a torch that is there is taken: it may be the only build that knows this machine's GPU
        if "$PYTHON" -c "import torch" 2>/dev/null; then
            echo "== using the torch that $PYTHON has"
            site=(--system-site-packages)
        fi
        echo "== making .venv with $("$PYTHON" --version)"
        "$PYTHON" -m venv "${site[@]}" .venv
    fi
    local pins=()
    if [ -n "$CONSTRAINTS" ]; then
        pins=(-c "$CONSTRAINTS")
        if .venv/bin/python -c "import torch" 2>/dev/null; then
            grep -v '^torch==' "$CONSTRAINTS" >.venv/constraints.txt
            pins=(-c .venv/constraints.txt)
        fi
    fi
    echo "== installing litpeft$1 into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${pins[@]}" -e ".$1"
    export PATH="$PWD/.venv/bin:$PATH"
}
