#!/usr/bin/env bash
# What one GPU does, in under ten minutes: training, short steps and answers with Llama-3.1-8B's shapes and random
# weights, beside the other tools that are installed. A line of JSON for each measurement, in OUT/gpu.jsonl.
#
#   bash scripts/bench_gpu.sh OUT MODEL [ROWS.json] [TOOL ...]
#
# MODEL is a small Llama's folder, for its tokenizer and its shapes (its weights are not read). With ROWS the command
# `litpeft finetune lora` is timed on them too. TOOLs: litpeft litpeft-nf4 litpeft-fp8 litpeft-checkpointing
# unsloth unsloth-nf4 peft.
# PYTHON is the interpreter, default .venv/bin/python.

set -uo pipefail
out=$1 model=$2 rows=${3:-} && shift $(($# < 3 ? $# : 3))
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(litpeft litpeft-nf4 litpeft-fp8 litpeft-checkpointing unsloth unsloth-nf4)
gpu=("${PYTHON:-.venv/bin/python}" "$(dirname "$0")/bench/gpu.py")
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
measure() { timeout 90 "${gpu[@]}" "$@" 2>"$out/last.log" | tee -a "$out/gpu.jsonl" || tail -n 3 "$out/last.log"; }

[ -d "$out/8b" ] || "${gpu[@]}" make "$out/8b" --tokenizer "$model"
[ -d "$out/small" ] || measure small "$out/small" --tokenizer "$model"
for tool in "${tools[@]}"; do measure train "$out/8b" --tool "$tool"; done
for tokens in 500 2048; do measure short "$out/small" --tokens $tokens; done
measure short "$out/8b" --tokens 2048
if [ -n "$rows" ]; then
    options=(--base.dir "$out/8b" --data.path "$rows" --out "$out/run" --train.batch_size 64 --train.max_steps 10 --overwrite true)
    began=$EPOCHREALTIME
    timeout 90 "${gpu[@]}" command finetune lora "${options[@]}" >"$out/command.log" 2>&1 || tail -n 5 "$out/command.log"
    echo "{\"command\": \"litpeft finetune lora\", \"seconds\": $(awk "BEGIN { print $EPOCHREALTIME - $began }")}" | tee -a "$out/gpu.jsonl"
    tail -n 4 "$out/run/metrics.csv"
fi
for quantize in "" nf4; do
    for count in 1 16; do measure decode "$out/8b" --rows $count ${quantize:+--quantize $quantize}; done
done
