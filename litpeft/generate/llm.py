"""A model in Python: `litpeft.load("out/mine").generate("What is the colour of the sky?")`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from litpeft.core.errors import ConfigError, DataError
from litpeft.data.formats import FORMATS
from litpeft.data.prompts import Prompt, content
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.batch import Batch
from litpeft.generate.engine import answer, prompt_ids, stream
from litpeft.generate.load import Loaded, load_model
from litpeft.generate.settings import Sampling
from litpeft.model.delta import without_delta
from litpeft.model.gpt import GPT

Messages = Sequence[Mapping[str, Any]]


@dataclass
class LLM:
    """A model ready to answer, on the first device there is."""

    loaded: Loaded

    @property
    def model(self) -> GPT:
        """Returns the torch module."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.loaded.tokenizer

    def generate(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        *,
        raw: bool = False,
        system: str | None = None,
        batch_size: int = 16,
        **sampling: Any,
    ) -> str | list[str]:
        """Returns the answer to a prompt, or a list of those to several, of which `batch_size` are written at once.

        A prompt is a text, or a list of messages such as {"role": "user", "content": "..."}. With `raw` its text is
        continued as it stands, without the chat template. `system` is the system message of those that have none; by
        default that of the training. `sampling` are keys of `litpeft generate --sampling.*`: max_new_tokens,
        temperature, stop, seed, ...; the answer to prompt i draws with seed + i.
        """
        alone = isinstance(prompts, str) or isinstance(next(iter(prompts), None), Mapping)
        ids = [self._ids(one, raw, system) for one in ([prompts] if alone else prompts)]
        stop_ids = self._stop_ids(raw)
        answers = answer(
            self.model, ids, self.tokenizer, Sampling(**sampling), stop_ids, rows=min(batch_size, len(ids))
        )
        texts = [one.text for one in answers]
        return texts[0] if alone else texts

    def stream(
        self, prompt: str | Messages, *, raw: bool = False, system: str | None = None, **sampling: Any
    ) -> Iterator[str]:
        """Yields the answer to a prompt piece by piece, as it is written; the arguments are those of `generate`."""
        ids = self._ids(prompt, raw, system)
        yield from stream(Batch(self.model, 1), ids, self.tokenizer, Sampling(**sampling), self._stop_ids(raw))[1]

    def base(self) -> AbstractContextManager[None]:
        """Returns a context in which the base answers, without what a run has learned beside it."""
        if not self.loaded.has_delta:
            raise ConfigError("this model has no finetuned part that could be switched off")
        return without_delta(self.model)

    def _ids(self, prompt: str | Messages, raw: bool, system: str | None) -> list[int]:
        """Returns the tokens of a prompt."""
        row = {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(one) for one in prompt]}
        form = FORMATS["prompt_completion" if isinstance(prompt, str) else "messages"]
        try:
            asked = Prompt(row, content(row, raw, form), "prompt")
        except ValueError as error:
            raise DataError(str(error), where="prompt") from None
        return prompt_ids(self.loaded, asked, self.loaded.system if system is None else system)

    def _stop_ids(self, raw: bool) -> Sequence[int]:
        return self.tokenizer.stop_ids if raw else self.loaded.template.stop_ids


def load(
    model: str,
    *,
    base: str | None = None,
    precision: str = "auto",
    quantize: str | None = None,
    method: Mapping[str, Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> LLM:
    """Returns the model of a base folder, a merged folder, a run or an adapter of peft.

    The arguments are the options of `litpeft generate` of these names.
    """
    return LLM(load_model(str(model), base, precision, quantize, method, template_options=template_options))
