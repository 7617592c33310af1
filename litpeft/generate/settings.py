"""Settings of the commands that let a model write: generate, chat, serve, evaluate."""

from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

from litpeft.core.early_sums import compared
from litpeft.core.errors import quoted
from litpeft.core.kinds import check_choices, check_least
from litpeft.data.settings import Format, Thinking, check_columns
from litpeft.model.quantize import STORAGES


@dataclass
class Answering:
    """The model that answers."""

    model: str
    """A base folder, a run, or a merged folder."""
    also: tuple[str, ...] = field(default=(), kw_only=True)  # these after a command's own keys
    """More models or runs, each called like its folder, that do the same; in a chat /use changes to one of them."""
    base: str | None = field(default=None, kw_only=True)
    """Folder of the base model, if it has moved since the run."""
    precision: Literal["auto", "bf16-true", "16-true", "32-true", "64-true"] = field(default="auto", kw_only=True)
    """Type of weights and activations; auto: bf16-true where the device has it, else 32-true."""
    quantize: Literal[tuple(STORAGES)] | None = field(default=None, kw_only=True)
    """Hold a model's linear layers in 2, 3, 4 or 8 bits a weight; a run's base is held as the run held it."""
    method: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """Other values for keys of the run's method, those that may change after training, e.g. {"skip_layers": 5}."""
    template_options: dict[str, Any] | None = field(default=None, kw_only=True)
    """What the model's template is told, such as {"enable_thinking": false}; a run is told what it was trained with."""

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def compared(self) -> list[Path]:
        """Returns the folders whose weights' sums the command compares."""
        return [folder for path in (self.model, *self.also) for folder in compared(path, self.base)]


@dataclass
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together hold this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens seen so far, multiplies negative ones; 1 = off."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    stop: tuple[str, ...] = ()
    """Strings at which an answer ends; they are not part of it."""
    lookup: int = 8
    """Guess up to so many tokens of a single answer from what it says already, and check them in one pass; 0 = off."""
    seed: int = 0
    """Seeds the sampling; in a file of prompts the row's number is added."""

    def __post_init__(self) -> None:
        greedy = self.temperature == 0  # between 0 and 0.001 float32 could overflow, and it would be greedy anyway
        _check("temperature", self.temperature, greedy or 1e-3 <= self.temperature < inf, "0 or at least 0.001")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < inf, "above 0")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        _check("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "a list of strings, none empty")
        _check("lookup", self.lookup, 0 <= self.lookup <= 64, "at least 0 (off) and at most 64")
        _check("seed", self.seed, 0 <= self.seed < 2**62, "in [0, 2^62)")


def _check(key: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"sampling.{key} must be {allowed}, got {quoted(value)}")


@dataclass
class Generate(Answering):
    """Answer a prompt, or every row of a file."""

    prompt: str | None = None
    """The text to answer; `-` or none reads standard input."""
    input: str | None = None
    """File of prompts: any kind that `litpeft finetune` reads, a .txt with one a line; hf://ORG/NAME, a data set of the
    hub; `-` is standard input."""
    format: Format = "auto"
    """Shape of a row; auto: seen from its keys, which may differ from row to row."""
    columns: dict[str, str] | None = None
    """Columns of your own, as for `litpeft finetune`: {"user": "question"}; default: those of a run, if the
    rows have them."""
    output: str | None = None
    """Write .jsonl rows with the answers to this new file instead of printing them. A .part file beside it keeps
    those that have come until it is whole."""
    resume: bool = False
    """Go on with the answers in the .part file of the same command, which was stopped."""
    batch_size: int = 16
    """Prompts of the file that are answered at once."""
    raw: bool = False
    """Continue the text as it stands, without the chat template."""
    system: str | None = None
    """System message, for every row that has none of its own."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.input is not None:
            raise ValueError("prompt and input exclude each other; the prompts come from one of them")
        if self.raw and self.system is not None:
            raise ValueError("raw and system exclude each other; raw text has no system message")
        check_resumes(self)
        check_least(self, batch_size=1)
        check_columns(self)


@dataclass
class Chat(Answering):
    """Talk with a model in the terminal."""

    system: str | None = None
    """System message."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9, max_new_tokens=512))


@dataclass
class Serve(Answering):
    """Answer requests of OpenAI's chat and completion API, for a base and any number of runs at once."""

    runs: str | None = None
    """Folder of more runs of the same base, as `model` is or has: a request names one by its folder's name, and it is
    loaded then. Runs that are trained while the server runs count."""
    runs_held: int = 16
    """Runs of that folder that are in memory at once; the one idle longest gives way to another."""
    host: str = "127.0.0.1"
    """Address to listen at. One that other machines reach wants a key, in the environment variable LITPEFT_API_KEY."""
    port: int = 8000
    """Port to listen at; 0 = a free one."""
    batch_size: int = 16
    """Answers of one model and its runs that are written at once; further requests wait."""
    max_waiting: int = 256
    """Answers that may wait; further requests are refused with status 429."""
    max_length: int = 8192
    """Longest conversation, in tokens, answer included. Memory for keys and values grows up to batch_size times it."""
    system: str | None = None
    """System message, for every chat that has none of its own."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9, max_new_tokens=512))
    """What holds where a request does not say otherwise; without a seed of its own each draws differently."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, port=0, batch_size=1, max_waiting=0, max_length=2, runs_held=1)
        for key, most in {"port": 65535, "runs_held": 1000}.items():
            if getattr(self, key) > most:
                raise ValueError(f"{key} must be at most {most:,}, got {getattr(self, key):,}")


OF_ROWS = ("format", "columns", "thinking", "pairs", "shots_from", "max_new_tokens", "samples", "neutral", "resume")
OF_TASKS = ("task_folder", "as_chat")


@dataclass
class Evaluate(Answering):
    """Measure a model: loss and exact answers on rows, or the metrics of tasks of lm-evaluation-harness."""

    data: str | None = None
    """Rows as `litpeft finetune` reads them: a file, a glob, a folder with validation.*, or a data set of the hub
    (hf://ORG/NAME, or a well-known one). Of a data set the split validation is measured; if it has none, test."""
    tasks: tuple[str, ...] = ()
    """Measure these tasks instead: names of lm-evaluation-harness between commas, such as arc_easy,hellaswag, its
    patterns (mmlu_*), or YAML files of tasks. They need pip install 'litpeft[tasks]'."""
    task_folder: str | None = None
    """Folder of tasks of your own, as YAML, that `tasks` may name too."""
    as_chat: bool = False
    """Tasks: ask through the chat template, shots as earlier turns; default: plain text, as most results are given."""
    format: Format = "auto"
    """Shape of a row; auto: seen from its keys, which may differ from row to row."""
    columns: dict[str, str] | None = None
    """Columns of your own, as for `litpeft finetune`: {"user": "question", "assistant": "answer"}; default: those of a
    run, if rows have them."""
    thinking: Thinking | None = None
    """Rows with thoughts that the template leaves out, as data.thinking; default: as the run was trained, or error."""
    pairs: bool = False
    """Rows are pairs of answers: say, too, of how many the chosen answer is more likely per token than the rejected."""
    compare_base: bool = True
    """For a run: measure its base too, and show both side by side."""
    shots: int | None = None
    """In-context learning: begin each row's chat with so many rows of shots_from, questions and answers; default:
    none, or as many as a task says."""
    shots_from: str | None = None
    """File of the rows for shots, from its first on; default: the train.* of the folder `data`."""
    max_rows: int | None = None
    """Measure on the first so many rows only, or documents of each task."""
    max_new_tokens: int = 128
    """Longest answer, in tokens; a task has its own."""
    batch_size: int = 16
    """Rows answered at once."""
    samples: int = 2
    """Rows whose answers are shown."""
    neutral: str = "none"
    """Measure the loss on text that shows what was forgotten, too: auto (a page of plain English), or a .txt file."""
    output: str | None = None
    """Write every row's answers and scores here, as .jsonl. A .part file beside it keeps the answers until then.
    Tasks: all documents as .jsonl, or the results as .json."""
    resume: bool = False
    """Go on with the answers in the .part file of the same command, which was stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, shots=0, max_rows=1, max_new_tokens=1, batch_size=1, samples=0)
        if (self.data is None) == (not self.tasks):
            both = "exclude each other" if self.tasks else "are both missing"
            raise ValueError(f"data and tasks {both}; give rows (litpeft evaluate MODEL ROWS) or tasks (--tasks NAMES)")
        of_other = OF_ROWS if self.tasks else OF_TASKS
        for one in fields(self):
            if one.name in of_other and getattr(self, one.name) != one.default:
                raise ValueError(f"{one.name} is used only with {'data' if self.tasks else 'tasks'}")
        check_columns(self)
        if self.shots_from is not None and not self.shots:
            raise ValueError("shots_from is used only with shots, which is 0")
        check_resumes(self)


def check_resumes(settings: Generate | Evaluate) -> None:
    if settings.resume and settings.output is None:
        raise ValueError("resume is used only with output, beside which the answers are kept")
