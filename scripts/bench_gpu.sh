#!/usr/bin/env bash
# What one GPU does, in under ten minutes: start, training, short steps and answers with Llama-3.1-8B's shapes and random
# weights, beside the other tools that are installed. A line of JSON for each row in OUT/gpu.jsonl, and at the end the
# table with the targets, OUT/gpu.md. Without a GPU it is a dry run: tiny shapes on the CPU, to see that every row starts.
#
#   bash scripts/bench_gpu.sh OUT MODEL [ROWS.json] [TOOL ...]
#
# MODEL is a small Llama's folder, for its tokenizer and its shapes (its weights are not read). With ROWS the command
# `litpeft finetune lora` is timed on them too. TOOLs: litpeft litpeft-nf4 litpeft-fp8 litpeft-checkpointing
# litpeft-offload litpeft-plain litpeft-cheap unsloth unsloth-nf4 peft.
#
#   PYTHON   the interpreter; default .venv/bin/python, or python3 where there is none
#   WHEELS   a folder of wheels to install for this run, without a network; default wheels/, if it exists
#   SECONDS_IN_ALL, SECONDS_A_ROW   limits, 570 and 90: what has no time left is left out, and the table says so

set -uo pipefail
out=$1 model=$2 rows=${3:-} && shift $(($# < 3 ? $# : 3))
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(litpeft litpeft-nf4 litpeft-fp8 litpeft-checkpointing litpeft-offload litpeft-cheap unsloth unsloth-nf4)
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
bench=$(dirname "$0")/bench
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
: >"$out/gpu.jsonl"
wheels=${WHEELS:-wheels}
if [ -d "$wheels" ]; then
    export PYTHONPATH="$PYTHONPATH:$out/site"
    [ -d "$out/site" ] || "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$wheels"/*.whl
fi

# limited COMMAND...: runs it in the time that is left, at most SECONDS_A_ROW
limited() {
    local left=$((${SECONDS_IN_ALL:-570} - SECONDS)) most=${SECONDS_A_ROW:-90}
    [ "$left" -gt 5 ] || { echo "no time left" >"$out/last.log"; return 1; }
    timeout -k 5 $((left < most ? left : most)) "$@"
}

# row NAME SCRIPT ARGUMENTS...: a measurement; one that fails has a row too, and the others go on
row() {
    local name=$1 script=$2 code
    shift 2
    BEGAN=$EPOCHREALTIME limited "$python" "$bench/$script" "$@" >"$out/row" 2>"$out/last.log"
    code=$?
    grep '^{"row"' "$out/row" | tee -a "$out/gpu.jsonl"
    [ $code -ne 0 ] || return 0
    tail -n 3 "$out/last.log" >&2
    [ $code -eq 124 ] && echo "not done in time" >>"$out/last.log"
    grep -q '^{"row"' "$out/row" || failed "$name" "exit code $code, $(tail -n 1 "$out/last.log")"
}
failed() {
    "$python" -c 'import json, sys; print(json.dumps({"row": sys.argv[1], "failed": sys.argv[2][:120]}))' "$@" |
        tee -a "$out/gpu.jsonl"
}

[ -d "$out/8b" ] || limited "$python" "$bench/gpu.py" make "$out/8b" --tokenizer "$model"
[ -d "$out/small" ] || limited "$python" "$bench/gpu.py" small "$out/small" --tokenizer "$model"
# first what was measured least
for quantize in "" nf4; do
    row "load ${quantize:-bf16}" gpu_start.py load "$out/8b" ${quantize:+--quantize $quantize}
    row "first_answer ${quantize:-bf16}" gpu_start.py first_answer "$out/8b" ${quantize:+--quantize $quantize}
done
row "documents 8b" gpu_documents.py "$out/8b"
row "answers nf4 16" gpu.py decode "$out/8b" --rows 16 --quantize nf4
row "answers bf16 16 of 4 runs" gpu.py decode "$out/8b" --rows 16 --runs 4
row "documents small" gpu_documents.py "$out/small"
row "load bf16 cold" gpu_start.py load "$out/8b" --cold
for tool in "${tools[@]}"; do row "train $tool" gpu.py train "$out/8b" --tool "$tool"; done
for tokens in 500 2048; do row "short small $tokens" gpu.py short "$out/small" --tokens $tokens; done
row "short 8b 2048" gpu.py short "$out/8b" --tokens 2048
for count in 1 16; do row "answers bf16 $count" gpu.py decode "$out/8b" --rows $count; done
row "answers nf4 1" gpu.py decode "$out/8b" --quantize nf4
if [ -n "$rows" ]; then
    options=(--base.dir "$out/8b" --data.path "$rows" --out "$out/run" --train.batch_size 64 --train.max_steps 10 --overwrite true)
    row command gpu_start.py command finetune lora "${options[@]}"
fi
row "kernels" gpu_kernels.py
row "decode kernels" gpu_decode_kernels.py
"$python" "$bench/gpu.py" table "$out/gpu.jsonl" | tee "$out/gpu.md"
