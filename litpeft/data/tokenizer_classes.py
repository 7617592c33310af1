"""What transformers 5 knows of the classes of tokenizers that tokenizer_config.json names."""

LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer")  # a space becomes ▁, and a text starts with one
QWEN2_SPLIT = (  # the pieces of a text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN3_5_SPLIT = QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
WHOLE, CUTS = ("ByteLevel", True), ("ByteLevel", False)  # use_regex
# class -> the normalizers and the steps of the pre-tokenizer that it has, whatever tokenizer.json says
PARTS = {
    "GPT2Tokenizer": ([], [WHOLE]),
    "CodeGenTokenizer": ([], [WHOLE]),  # Phi's
    "GPTNeoXTokenizer": (["NFC"], [WHOLE]),
    "Qwen2Tokenizer": (["NFC"], [("Split", QWEN2_SPLIT), CUTS]),
    "Qwen3_5Tokenizer": (["NFC"], [("Split", QWEN3_5_SPLIT), CUTS]),
    "CohereTokenizer": (["NFC"], [("Digits", True), WHOLE]),
    "GemmaTokenizer": (["Replace"], [("Split", None)]),
}
BYTE_LEVEL = tuple(name for name in PARTS if name != "GemmaTokenizer")
AS_IT_IS = ("", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")  # tokenizer.json says all
# model_type -> the class that transformers 5 has for it; "" wins over tokenizer_class, and so does that of SURE.
REGISTERED = {
    **dict.fromkeys(("gpt2", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(("mistral", "mixtral", "ministral", "ministral3", "phi3", "nemotron", "stablelm"), ""),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "olmo2", "olmo3", "glm", "glm4", "glm4_moe"), ""),
    **dict.fromkeys(("ernie4_5", "ernie4_5_moe"), ""),
}
SURE = ("qwen2", "qwen3_5_moe_text")  # published folders name wrong classes
# The special tokens of a class that tokenizer_config.json does not name.
END = "<|endoftext|>"
NAMES = {
    **dict.fromkeys(LLAMA, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    **dict.fromkeys(("GPT2Tokenizer", "CodeGenTokenizer"), {"bos_token": END, "eos_token": END, "unk_token": END}),
    "GPTNeoXTokenizer": {"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": "<|padding|>"},
    **dict.fromkeys(("Qwen2Tokenizer", "Qwen3_5Tokenizer"), {"eos_token": END, "unk_token": END, "pad_token": END}),
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}
ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Keys that change ids if they are true, in classes whose meaning of them is not known here.
FOREIGN = ("add_prefix_space", "legacy", "sp_model_kwargs", "do_lower_case", "strip_accents", "remove_space")
AS_IT_IS_HINT = 'write "tokenizer_class": "PreTrainedTokenizerFast" to use tokenizer.json as it is'
