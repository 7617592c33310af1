"""The registry of finetuning methods: a method is one file here and one line in METHODS."""

from importlib import import_module

METHODS = {
    "lora": ("litpeft.methods.lora:LoRA", "Low-rank updates beside frozen linear layers."),
    "qlora": ("litpeft.methods.lora:LoRA", "LoRA on a base that is held in 4 bits (NF4)."),
    "lora_fa": ("litpeft.methods.lora_fa:LoRAFA", "LoRA whose first matrix is frozen: less memory."),
    "dora": ("litpeft.methods.dora:DoRA", "Low-rank updates of rows' directions, and their norms."),
    "ada_lora": ("litpeft.methods.ada_lora:AdaLoRA", "LoRA that moves its ranks to where they matter."),
    "multi_lora": ("litpeft.methods.multi_lora:MultiLoRA", "Several low-rank updates beside a layer, each scaled."),
    "tied_lora": ("litpeft.methods.tied_lora:TiedLoRA", "One low-rank pair for all blocks, scaled in each."),
    "pissa": ("litpeft.methods.pissa:PiSSA", "LoRA that starts as the weights' largest parts (SVD)."),
    "loftq": ("litpeft.methods.loftq:LoftQ", "LoRA on a 4-bit base whose codes fit its start."),
    "eva": ("litpeft.methods.eva:EVA", "LoRA that starts along its inputs' main directions."),
    "lora_ga": ("litpeft.methods.lora_ga:LoRAGA", "LoRA that starts along the weights' gradients."),
    "qa_lora": ("litpeft.methods.qa_lora:QALoRA", "LoRA that folds into a base of 4, 3 or 2 bits."),
    "lq_lora": ("litpeft.methods.lq_lora:LQLoRA", "LoRA on a base of as many bits as a budget allows."),
    "long_lora": ("litpeft.methods.long_lora:LongLoRA", "LoRA for longer texts than the base can read."),
    "adapter": ("litpeft.methods.adapter:Adapter", "Gated prompts in the attention (LLaMA-Adapter)."),
    "adapter_v2": ("litpeft.methods.adapter_v2:AdapterV2", "Gated prompts, factors, biases and norms (V2)."),
    "vera": ("litpeft.methods.vera:VeRA", "Vectors that scale random matrices of all layers."),
    "ia3": ("litpeft.methods.ia3:IA3", "Factors on keys, values and what is in the MLP."),
    "glora": ("litpeft.methods.glora:GLoRA", "Factors and summands of weights, in searched forms."),
    "bitfit": ("litpeft.methods.bitfit:BitFit", "The biases of linear layers and norms."),
    "selective": ("litpeft.methods.selective:Selective", "Norms, the last blocks, or parameters by name."),
    "bottleneck": ("litpeft.methods.bottleneck:Bottleneck", "Small networks after attention and MLP (adapters)."),
    "adapter_drop": (
        "litpeft.methods.adapter_drop:AdapterDrop",
        "Adapters that the first blocks can be left without.",
    ),
    # methods that write virtual tokens come last, so that no other of a combination changes those
    "reft": ("litpeft.methods.reft:ReFT", "Edits between blocks at the prompt's ends (LoReFT)."),
    "prefix": ("litpeft.methods.prefix:Prefix", "Learned keys and values before the text in each block."),
    "ptuning_v2": ("litpeft.methods.ptuning_v2:PTuningV2", "Prefix tuning with more and larger keys and values."),
    "prompt": ("litpeft.methods.prompt:Prompt", "Learned vectors before the text, in place of tokens."),
    "ptuning": ("litpeft.methods.ptuning:PTuning", "Vectors from a small network, with words among them."),
    "pre_embed": ("litpeft.methods.pre_embed:PreEmbed", "Learned vectors before the text and after its prompt."),
    "pre_layer": ("litpeft.methods.pre_layer:PreLayer", "The same, in place of what each block computes there."),
    "combo": ("litpeft.methods.combo:Combo", "Several methods in one run, such as LoRA with a prefix."),
    "full": ("litpeft.methods.full:Full", "The model's own weights, all or some."),
}

# defaults that differ from one method to another; the rates and epochs are those that learn the quickstart's task
PRESETS: dict[str, dict[str, object]] = {
    "lora": {"train.lr": 1e-3},
    "qlora": {"train.lr": 2e-3, "base.quantize": "nf4"},
    "lora_fa": {"train.lr": 4e-3},
    "dora": {"train.lr": 1e-3},
    "ada_lora": {"train.lr": 5e-3},
    "multi_lora": {"train.lr": 1e-3},
    "tied_lora": {"train.lr": 2e-2},
    "pissa": {"train.lr": 5e-4},
    "loftq": {"train.lr": 1e-3, "base.quantize": "nf4"},
    "eva": {"train.lr": 1e-3},
    "lora_ga": {"train.lr": 2e-4},
    "qa_lora": {"train.lr": 1e-3, "base.quantize": "int4"},
    "lq_lora": {"train.lr": 1e-3, "base.quantize": "nf4"},
    "long_lora": {"train.lr": 5e-4},
    "adapter": {"train.lr": 1e-2, "train.epochs": 3},
    "adapter_v2": {"train.lr": 5e-3},
    "vera": {"train.lr": 3e-2},
    "ia3": {"train.lr": 1e-2},
    "glora": {"train.lr": 2e-3, "train.epochs": 2},
    "bitfit": {"train.lr": 1e-2},
    "selective": {"train.lr": 1e-2},
    "bottleneck": {"train.lr": 2e-3},
    "adapter_drop": {"train.lr": 2e-3, "train.epochs": 3},
    "reft": {"train.lr": 5e-3, "train.epochs": 3},
    "prefix": {"train.lr": 3e-2, "train.epochs": 3},
    "ptuning_v2": {"train.lr": 3e-2, "train.epochs": 3},
    "prompt": {"train.lr": 3e-2, "train.epochs": 5},
    "ptuning": {"train.lr": 5e-3, "train.epochs": 3},
    "pre_embed": {"train.lr": 3e-2, "train.epochs": 5},
    "pre_layer": {"train.lr": 2e-2, "train.epochs": 3},
    "combo": {"train.lr": 2e-3},
    "full": {"train.lr": 5e-5},
}


def method_class(name: str) -> type:
    """Returns the dataclass of a method; imports its file, and so torch."""
    module, _, cls = METHODS[name][0].partition(":")
    return getattr(import_module(module), cls)
