#!/usr/bin/env bash
# Everything litpeft is for, on a model of 135 million parameters and two CPU cores: get a model, teach it to turn an
# order into JSON with LoRA, see what it learned, merge, generate. Can be run again. Arguments go to `litpeft finetune`:
#
#   bash scripts/quickstart.sh --train.max_steps 5
#   MAX_ROWS=16 bash scripts/quickstart.sh           asks only 16 of the 48 orders at the end

source "$(dirname "$0")/environment.sh"
run=out/smollm2-135m/lora
orders=config_hub/data/orders

install_litpeft ""
get_model

say "finetuning on $(wc -l <$orders/train.jsonl) orders"
litpeft finetune lora --config config_hub/smollm2-135m/lora.yaml --overwrite "$@"

say "what it learned: orders that it has never seen, before and after"
litpeft evaluate "$run" "$orders/validation.jsonl" ${MAX_ROWS:+--max_rows "$MAX_ROWS"}

say "merging into an ordinary Hugging Face folder"
litpeft merge "$run" --overwrite

say "asking the merged model"
litpeft generate "$run/merged" --prompt "$(head -n 1 $orders/validation.jsonl | .venv/bin/python -c 'import json, sys; print(json.loads(sys.stdin.readline())["instruction"])')"

say "done; the report is $run/report.md; next: .venv/bin/litpeft chat $run"
