#!/usr/bin/env bash
# Greedy writing beside transformers, Lit-GPT and llama.cpp: one prompt and sixteen, the same new tokens, in turn, several
# rounds. Leaves generate.json and generate.md in out/bench.
#
#   bash scripts/bench_generate.sh [--rounds 3] [--new-tokens 128] [--batches 1,16] [--only 'litpeft bf16,litgpt bf16']
#   bash scripts/bench_generate.sh --help

source "$(dirname "$0")/bench/environments.sh"
install_litpeft ""
for word in "$@"; do
    [ "$word" = --help ] && exec .venv/bin/python -m scripts.bench.generate --help
done
get_model
peer_litgpt
peer_trl # its environment has transformers
peer_llama_cpp
model_asked_for "$@"
litgpt_model
exec .venv/bin/python -m scripts.bench.generate "$@"
