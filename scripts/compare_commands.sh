#!/usr/bin/env bash
# The quickstart's task with each file of config_hub/smollm2-135m, or those that METHODS names, one after the other. Each
# run answers the held-out orders; the end is a table in Markdown. Can be run again. Arguments go to each
# `litpeft finetune`:
#
#   METHODS="lora dora" bash scripts/compare_commands.sh --train.max_steps 3

source "$(dirname "$0")/environment.sh"
runs=out/smollm2-135m
answers=out/compare_commands
orders=config_hub/data/orders/validation.jsonl

install_litpeft ""
get_model

mkdir -p "$answers"
rows=()
for method in ${METHODS:-$(cd config_hub/smollm2-135m && basename -s .yaml -- *.yaml)}; do
    say "finetuning with $method"
    began=$SECONDS
    litpeft finetune "$method" --config "config_hub/smollm2-135m/$method.yaml" --overwrite "$@" --out "$runs/$method"
    seconds=$((SECONDS - began))
    say "$method: orders that it has never seen"
    rm -f "$answers/$method.jsonl"
    litpeft evaluate "$runs/$method" "$orders" --compare_base false --samples 0 --output "$answers/$method.jsonl"
    rows+=("$runs/$method" "$answers/$method.jsonl" "$seconds")
done

say "the commands side by side"
.venv/bin/python scripts/comparison_table.py "${rows[@]}"
