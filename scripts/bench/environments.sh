# Sourced by the benchmarks: litpeft in .venv, a small model in checkpoints/, and each peer in an environment of its own
# under .bench/. A peer that cannot be installed is left out, and the table says so.
#
#   PYTHON, CONSTRAINTS   as in scripts/environment.sh; with CONSTRAINTS= the peers get the newest torch too

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# Lit-GPT's copy is of the model that is asked for
model_asked_for() {
    local previous=
    for word in "$@"; do
        [ "$previous" = --model ] && model=$word
        previous=$word
    done
    return 0
}

# peer NAME IMPORT REQUIREMENT...: makes .bench/NAME, and .bench/NAME/ready once IMPORT can be imported in it
peer() {
    local name=$1 import=$2 torch
    shift 2
    local home=.bench/$name
    [ -e "$home/ready" ] && return
    echo "== making $home: $*"
    mkdir -p .bench
    "$PYTHON" -m venv "$home"
    if torch=$("$PYTHON" -c "import os, torch; print(os.path.dirname(torch.__path__[0]))" 2>/dev/null); then
        echo "$torch" >"$("$home/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/found_torch.pth"
    elif [ -n "$CONSTRAINTS" ]; then
        set -- "$(grep '^torch==' "$CONSTRAINTS")" "$@"
    fi
    if "$home/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$home.log" 2>&1 &&
        "$home/bin/python" -c "import $import" >>"$home.log" 2>&1; then
        touch "$home/ready"
    else
        echo "== $name cannot be used here; it is left out. The reason is in $home.log"
    fi
}

peer_litgpt() { peer litgpt litgpt litgpt==0.5.13 requests; } # its own install lacks requests
peer_trl() { peer trl trl trl==1.16.0 peft==0.21.2 bitsandbytes==0.50.2; }
peer_llama_cpp() { peer gguf xllamacpp xllamacpp==2026.10.11549; }

# Lit-GPT reads its own format; made once. It goes by the folder's name: one that begins with SmolLM2 would get a token
# before every row that the other tools do not see
litgpt_model() {
    local copy=.bench/models/litgpt/of-$(basename "$model")
    if [ -e .bench/litgpt/ready ] && [ ! -e "$copy/lit_model.pth" ]; then
        echo "== converting the model for Lit-GPT"
        mkdir -p "$copy"
        cp "$model"/* "$copy"
        .bench/litgpt/bin/litgpt convert_to_litgpt "$copy" --model_name "$(basename "$model")" >.bench/convert.log 2>&1 ||
            { echo "== Lit-GPT cannot convert the model: see .bench/convert.log"; rm -f .bench/litgpt/ready; }
        rm -f "$copy/model.safetensors"
    fi
}
