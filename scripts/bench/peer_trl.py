"""Finetunes with TRL and PEFT as a JSON file says: {model, rows, out, sft, lora, quantize}. Runs in TRL's environment.

    python -m scripts.bench.peer_trl SETTINGS.json

`sft` are SFTConfig's own settings, `lora` those of LoraConfig (null trains all weights); what is not named there keeps
the library's default. `quantize` holds the base in NF4 through bitsandbytes, double-quantised.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main(path: str) -> None:
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    sft = dict(settings["sft"])
    model_init = dict(sft.pop("model_init_kwargs", {}))
    if settings["quantize"]:
        model_init["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    arguments = SFTConfig(output_dir=settings["out"], model_init_kwargs=model_init, **sft)
    rows = load_dataset("json", data_files=settings["rows"], split="train")
    lora = settings["lora"] and LoraConfig(task_type="CAUSAL_LM", **settings["lora"])
    trainer = SFTTrainer(model=settings["model"], args=arguments, train_dataset=rows, peft_config=lora)
    trainer.train()
    trainer.save_model(settings["out"])


if __name__ == "__main__":
    main(sys.argv[1])
