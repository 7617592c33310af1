"""llama.cpp as a client of the files that are written: next-token log-probabilities, greedy tokens, chats."""

import json
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from conftest import CHATML
from tiny_gguf import digits

from litpeft.core.json import write_json
from litpeft.model.gpt import GPT

A_DOT = digits().token_to_id(".")


def write_bpe(folder: Path) -> Path:
    """Gives a folder a byte-level tokenizer with merges, of SmolLM2's kind: 317 tokens."""
    digits().save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", named)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@contextmanager
def server(path: Path, lora: Path | None = None, context: int = 128) -> Iterator[xllamacpp.Server]:
    """Yields llama.cpp with a model, and with an adapter on it."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity, params.warmup, params.port = str(path), context, -1, False, 0
    params.n_parallel, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 1, 1, 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.fit_params = False
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    yield xllamacpp.Server(params)


def ask(client: xllamacpp.Server, path: str, **body: object) -> Any:
    """Returns the answer of llama.cpp's own interface, which has the ids of parts of characters, too."""
    request = urllib.request.Request(client.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def complete(client: xllamacpp.Server, prompt: list[int], tokens: int, **more: object) -> dict[str, Any]:
    """Returns up to so many new `tokens`, greedily chosen."""
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
    return ask(client, "/completion", **asked, **more)


def next_token(client: xllamacpp.Server, prompt: list[int], rows: int) -> torch.Tensor:
    """Returns the log-probabilities of all ids, before any is banned: the one that is chosen is to be a whole text."""
    found, banned = torch.full((rows,), torch.nan), [[number, False] for number in range(rows) if number != A_DOT]
    answer = complete(client, prompt, 1, n_probs=rows, logit_bias=banned)
    for entry in answer["completion_probabilities"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


@torch.no_grad()
def of_model(model: GPT, prompt: list[int]) -> torch.Tensor:
    """Returns the log-probabilities of all ids for the next token of our model."""
    return model(torch.tensor([prompt]))[0, -1].float().log_softmax(-1)


@torch.no_grad()
def greedy(model: GPT, prompt: list[int], answer: list[int], tokens: int, stop: Collection[int]) -> list[int]:
    """Returns our model's most probable ids after the prompt and after each id of an answer.

    They are those of the answer if and only if it is our model's greedy one: up to the first id that ends it, or of so
    many `tokens`.
    """
    best = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :].argmax(-1).tolist()
    end = next((at for at, number in enumerate(best, 1) if number in stop), tokens)
    return best[: min(end, tokens)]
