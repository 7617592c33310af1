#!/usr/bin/env bash
# Finetuning beside Lit-GPT and TRL + PEFT: the same model, rows, LoRA, threads and number of samples, in turn, several
# rounds. Leaves train.json and train.md in out/bench. DATA is a .json or .jsonl file of alpaca rows.
#
#   bash scripts/bench_train.sh DATA.json [--rounds 3] [--rows 48] [--what lora,qlora,full] [--tools litpeft,litgpt,trl]
#   bash scripts/bench_train.sh --help
#   CONSTRAINTS= bash scripts/bench_train.sh DATA.json --device cuda --model checkpoints/ORG/NAME

words=()
for word in "$@"; do # paths are those of the folder that the command is given in
    [ -f "$word" ] || [[ "$word" == */* && -d "$word" ]] && word=$(realpath "$word")
    words+=("$word")
done
set -- "${words[@]}"
source "$(dirname "$0")/bench/environments.sh"
install_litpeft ""
for word in "$@"; do
    [ "$word" = --help ] && exec .venv/bin/python -m scripts.bench.train --help
done
get_model
peer_litgpt
peer_trl
model_asked_for "$@"
litgpt_model
exec .venv/bin/python -m scripts.bench.train "$@"
