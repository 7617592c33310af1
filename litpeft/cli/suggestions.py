"""Suggestions for an unknown key: a known key with a similar spelling, or the one for another tool's name."""

import json
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher, get_close_matches

from litpeft.generate.settings import Generate
from litpeft.train.settings import Finetune

# Our key -> its names in PEFT, transformers and TRL, Axolotl, LLaMA-Factory, torchtune, LitGPT, mlx-lm.
MEANINGS = {
    "method.rank": "r lora_r lora_rank network_dim",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.rslora": "use_rslora",
    "method.ranks": "rank_pattern",
    "method.targets": "target_modules lora_target lora_target_modules lora_modules lora_attn_modules",
    "method.add_tokens": "new_special_tokens add_new_special_tokens special_tokens trainable_token_indices tokens",
    "method.unfreeze": "modules_to_save unfrozen_parameters additional_target",
    "method.prompt_length": "num_virtual_tokens adapter_len adapter_prompt_length pre_seq_len",
    "method.hidden": "encoder_hidden_size prefix_hidden_size",
    "method.encoder": "encoder_reparameterization_type",
    "method.layers": "adapter_layers num_layers",
    "base.dir": "model base_model model_name model_name_or_path pretrained_model_name_or_path checkpoint_dir",
    "base.quantize": "load_in_4bit load_in_8bit quantization quantization_bit bnb_4bit_quant_type bnb bits",
    "base.double_quantize": "double_quant bnb_4bit_use_double_quant double_quantization",
    "base.precision": "bf16 fp16 dtype torch_dtype mixed_precision bnb_4bit_compute_dtype",
    "data.path": "dataset datasets dataset_name dataset_path data_path data_dir data_files train_file json_path",
    "data.validation_path": "validation_file eval_file eval_dataset val_data test_datasets dataset_validation",
    "data.validation_split": "val_set_size val_size val_split_fraction validation_split_percentage test_size",
    "data.template": "chat_template prompt_style prompt_template conversation_template",
    "data.template_options": "chat_template_kwargs enable_thinking reasoning_effort",
    "data.system": "system_prompt default_system system_message",
    "data.mask_prompt": "train_on_inputs train_on_input completion_only_loss assistant_only_loss train_on_prompt",
    "data.max_length": "max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size",
    "data.packing": "sample_packing packed",
    "data.format": "dataset_type dataset_format formatting",
    "train.batch_size": "per_device_train_batch_size gradient_accumulation_steps gradient_accumulation_iters "
    "global_batch_size train_batch_size effective_batch_size",
    "train.epochs": "num_train_epochs num_epochs n_epochs epoch",
    "train.max_steps": "num_steps iters max_iters max_steps_per_epoch",
    "train.lr": "learning_rate max_lr",
    "train.min_lr": "min_learning_rate lr_min cosine_min_lr",
    "train.warmup_steps": "lr_warmup_steps num_warmup_steps warmup_ratio warmup warmup_iters",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule decay_type",
    "train.optimizer": "optim optimizer_name optimizer_type",
    "train.optimizer_args": "optim_args optimizer_kwargs optimizer_config",
    "train.max_norm": "max_grad_norm gradient_clipping gradient_clip_val clip_grad_norm grad_clip",
    "train.neftune": "neftune_noise_alpha neftune_alpha noise_alpha noisy_embedding_alpha",
    "train.activation_checkpointing": "gradient_checkpointing grad_checkpoint enable_activation_checkpointing",
    "train.compile": "torch_compile",
    "preference.loss": "loss_type pref_loss rl",
    "preference.beta": "dpo_beta pref_beta simpo_beta rl_beta",
    "preference.margin": "simpo_gamma cpo_simpo_gamma",
    "preference.smoothing": "label_smoothing dpo_label_smoothing",
    "preference.likelihood": "rpo_alpha pref_ftx dpo_ftx",
    "validation.interval": "eval_steps eval_interval evaluation_strategy eval_strategy steps_per_eval",
    "validation.max_rows": "max_eval_samples eval_iters max_iters_eval val_batches",
    "validation.patience": "early_stopping_patience early_stopping",
    "validation.metric": "metric_for_best_model",
    "validation.final": "load_best_model_at_end",
    "checkpoint.interval": "save_steps save_interval save_strategy save_every saves_per_epoch",
    "checkpoint.keep_last": "save_total_limit",
    "out": "output output_dir out_dir save_dir output_path adapter_path save_path",
    "devices": "gpus num_gpus n_gpu nproc_per_node num_processes",
    "num_nodes": "nnodes nodes num_machines",
    "strategy": "fsdp deepspeed ddp",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir force",
    "tensorboard": "report_to logger logger_name",
    "model": "run adapter adapter_path model_path model_name model_name_or_path checkpoint_dir base_model model_id",
    "data": "dataset input tasks file",
    "run": "model adapter adapter_path checkpoint_dir lora_path model_name_or_path",
    "source": "repo_id model model_id repo hf_path model_name_or_path",
    "base": "base_model base_model_name_or_path",
    "quantize": "load_in_4bit load_in_8bit quantization bits",
    "precision": "bf16 fp16 dtype torch_dtype",
    "dtype": "torch_dtype outtype save_dtype precision",
    "system": "system_prompt system_message",
    "input": "prompts input_file file prompt_file",
    "output": "out output_dir output_file output_path",
    "template_options": "chat_template_kwargs enable_thinking reasoning_effort",
    "raw": "ignore_chat_template no_chat_template",
    "max_rows": "limit max_samples num_samples",
    "max_new_tokens": "max_tokens max_length",
    "sampling.max_new_tokens": "max_tokens max_length n_predict num_predict",
    "sampling.temperature": "temp",
    "sampling.repetition_penalty": "repeat_penalty",
    "sampling.stop": "stop_sequences stop_strings eos",
    "sampling.lookup": "prompt_lookup_num_tokens",
}

COMMANDS = {  # our command -> its names in other tools
    "finetune lora": "train sft tune fit",
    "evaluate": "eval test benchmark measure",
    "generate": "infer inference predict run answer complete",
    "merge": "export fuse",
    "download": "pull",
}
LONGEST = 100  # characters of a key that is compared with others; longer ones take too long


def suggest(key: str, known: Collection[str]) -> str:
    """Returns ` (did you mean "x"?)` for the known keys that `key` may mean, or "".

    Tried in turn: the same letters, another tool's name, the same last word, a key of another command, a misspelling in
    the same group. If nothing in a known group is similar, its keys are listed.
    """
    if len(key) > LONGEST:
        return ""
    group, _, leaf = _plain(key).rpartition(".")
    leaves = [name for name in known if name.rpartition(".")[2] == leaf]
    found = [name for name in known if _flat(name) == _flat(key)]
    elsewhere = _elsewhere(_plain(key), known)
    if not (group and elsewhere):  # our own name for a key of another command comes before another tool's name
        found = found or [name for name in known if leaf in MEANINGS.get(name, "").split()]
    found = found or sorted(leaves, key=lambda name: -SequenceMatcher(None, name, key).ratio())
    if not found and elsewhere:
        return elsewhere
    siblings = [name for name in known if name.rpartition(".")[0] == group]
    if not found:
        near = {name.rpartition(".")[2]: name for name in siblings}
        found = [near[hit] for hit in get_close_matches(leaf, near, n=1)]
    if not found and group and siblings:
        return f"; {group} has {', '.join(name.rpartition('.')[2] for name in siblings)}"
    if not found and len(leaf) > 2:  # two letters match by chance
        near = {name.rpartition(".")[2]: name for name in known}
        near |= {name.partition(".")[0]: name.partition(".")[0] for name in known if "." in name}  # groups
        found = [near[hit] for hit in get_close_matches(leaf, near, n=1)]
    if group:
        found = found[:1]
    return f" (did you mean {' or '.join(map(json.dumps, found))}?)" if found else ""


def suggest_command(word: str, names: Collection[str]) -> str:
    """Returns ` (did you mean "x"?)` for the command of `names` that `word` may mean, or ""."""
    found = [name for name, words in COMMANDS.items() if word in words.split()]
    found = found or get_close_matches(word, names, n=1, cutoff=0.7)
    return f' (did you mean "{found[0]}"?)' if found else ""


def _elsewhere(key: str, known: Collection[str]) -> str:
    """Returns a note that a key (or its last word) belongs to another command, or ""."""
    for command, settings in (("finetune", Finetune), ("generate", Generate)):
        groups = {field.name: fields(field.type) for field in fields(settings) if is_dataclass(field.type)}
        names = [f"{group}.{field.name}" for group, inner in groups.items() for field in inner]
        if command == "finetune" and not any(name.startswith("method.") for name in known):
            names += [name for name in MEANINGS if name.startswith("method.")]
        for name in names:
            if key in (name, name.rpartition(".")[2]):
                return f"; {name} belongs to litpeft {command}"
    return ""


def _plain(key: str) -> str:
    return key.lower().replace("-", "_")


def _flat(key: str) -> str:
    return _plain(key).replace(".", "_")
