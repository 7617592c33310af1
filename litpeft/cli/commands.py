"""The table of the commands."""

from dataclasses import dataclass

from litpeft.methods import METHODS


@dataclass(frozen=True)
class Command:
    """A command: a function called like its word, and its settings, a class called like that too."""

    settings: str  # module of the settings, whose fields are the options
    function: str  # module of the function, which takes the settings
    help: str
    example: str  # what follows the command's name
    method: str | None = None  # of litpeft.methods, for `finetune`
    in_yaml: bool = False  # its settings are many: no value stands without its option
    unnamed: str = ""  # an option that need not be given, whose value may stand alone


NEW_RUN = "--base.dir checkpoints/HuggingFaceTB/SmolLM2-360M-Instruct --data.path rows.jsonl --out out/mine"
ROWS = "rows.jsonl --model checkpoints/HuggingFaceTB/SmolLM2-360M-Instruct"
COMPARISON = "--config config_hub/smollm2-135m/compare.yaml"
COMMANDS = {
    "download": Command(
        "exchange.settings",
        "exchange.download",
        "Fetch a model or a data set.",
        "HuggingFaceTB/SmolLM2-360M-Instruct",
    ),
    "new": Command(
        "exchange.settings",
        "exchange.new",
        "Make a model of random weights to train.",
        "checkpoints/HuggingFaceTB/SmolLM2-360M-Instruct checkpoints/mine --changes '{\"num_hidden_layers\": 6}'",
    ),
    "convert": Command(
        "exchange.settings",
        "exchange.convert",
        "Turn GGUF, .bin or .pth into a Hugging Face folder.",
        "model.gguf checkpoints/model",
        unnamed="out",
    ),
    **{
        f"finetune {name}": Command("train.settings", "train.finetune", text, NEW_RUN, name, in_yaml=True)
        for name, (_, text) in METHODS.items()
    },
    "data show": Command("cli.data", "cli.data", "Show rows as the model sees them.", ROWS),
    "data check": Command("cli.data", "cli.data", "Check rows before a model learns them.", ROWS),
    "data parity": Command("cli.parity", "cli.parity", "Compare ids as trained, exported and generated.", "out/mine"),
    "data presets": Command("cli.data", "cli.data", "List well-known data sets.", "dolly", unnamed="name"),
    "methods": Command("cli.methods", "cli.methods", "List the methods, or show one of them.", "lora", unnamed="name"),
    "compare": Command(
        "cli.compare", "cli.compare", "Train several methods, and set them side by side.", COMPARISON, in_yaml=True
    ),
    "evaluate": Command(
        "generate.settings",
        "generate.evaluate",
        "Measure a model on rows, or on well-known tasks.",
        "out/mine held-out.jsonl",
        unnamed="data",
    ),
    "merge": Command(
        "exchange.settings", "exchange.merge", "Fold a run into its base, as a Hugging Face folder.", "out/mine"
    ),
    "combine": Command(
        "exchange.settings",
        "exchange.combine",
        "Turn runs, weighted and summed, into one of LoRA.",
        "out/mine out/mine-as-lora --rank 16",
    ),
    "inspect": Command(
        "exchange.settings",
        "exchange.inspect",
        "Show what a model, a run or a GGUF file holds.",
        "out/mine",
    ),
    "diff": Command(
        "exchange.settings",
        "exchange.diff",
        "Compare two models or runs, tensor by tensor.",
        "out/mine out/other",
    ),
    "generate": Command(
        "generate.settings",
        "generate.engine",
        "Answer a prompt, or a file of prompts.",
        'out/mine --prompt "What is the colour of the sky?"',
    ),
    "chat": Command("generate.settings", "generate.chat", "Talk with a model in the terminal.", "out/mine"),
    "serve": Command(
        "generate.settings",
        "generate.serve",
        "Answer OpenAI's API over HTTP, with many runs at once.",
        "out/mine --also '[out/other]'",
    ),
}


def called(name: str) -> str:
    """Returns the word of a command's name that its function is called: not the method, nor the group."""
    first, *rest = name.split()
    return first if not rest or COMMANDS[name].method else rest[0]
