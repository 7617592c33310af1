"""Rotary positions that depend on the length of a text, and windows that differ from layer to layer."""

import pytest
import torch
from test_model import CASES
from tiny_families import MODELS, make_family

from litpeft.generate.cache import TokenCache
from litpeft.model.build import build
from litpeft.model.context import Context

IDS = torch.randint(0, 257, (1, 60), generator=torch.Generator().manual_seed(1))
LONG = {"phi3": CASES["phi3, longrope"], "llama": CASES["dynamic"]}  # both change beyond 32 tokens


@pytest.mark.parametrize("name", LONG)
def test_a_document_of_a_packed_row_has_the_positions_of_its_own_length(name: str, tmp_path) -> None:
    make_family(tmp_path, name, torch.float64, **LONG[name])
    model = build(tmp_path, torch.float64)
    lengths = (20, 40)
    with torch.no_grad():
        packed = model(IDS, Context.packed(lengths, IDS.device, None))
        alone = torch.cat([model(part) for part in IDS.split(lengths, 1)], 1)
        assert (packed - alone).abs().max() <= 1e-10
        whole = model(IDS)[:, :20]
    assert (whole - alone[:, :20]).abs().max() > 1e-2


def test_an_answer_that_grows_beyond_the_length_is_read_anew(tmp_path) -> None:
    make_family(tmp_path, "phi3", torch.float64, **LONG["phi3"])
    model = build(tmp_path, torch.float64).eval()
    cache = TokenCache(model)
    for length in (20, 31, 32, 33, 34, 50):
        got = cache.logits([IDS[0, :length].tolist()])
        with torch.no_grad():
            assert (got - model(IDS[:, :length])[:, -1]).abs().max() <= 1e-10


def test_phi_answers_as_in_transformers_beyond_the_length(tmp_path) -> None:
    theirs = make_family(tmp_path, "phi3", **LONG["phi3"], initializer_range=0.3)
    cache, ids = TokenCache(build(tmp_path, torch.float32).eval()), IDS[:, :24]
    want = theirs.generate(ids, do_sample=False, min_new_tokens=20, max_new_tokens=20, pad_token_id=0)
    while ids.size(1) < 44:
        logits = cache.logits([ids[0].tolist()]).clone()
        logits[:, 1] = -torch.inf  # end of text, which min_new_tokens forbids
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ids, want)


def test_windows_that_differ_from_layer_to_layer_hold_in_a_cache_of_rows_of_unequal_length(tmp_path) -> None:
    for name in ("gemma4_text", "deepseek_v3", "gemma3_text", "smollm3", "cohere2", "olmo3"):
        make_family(tmp_path / name, name, torch.float64, **(MODELS[name] | {"initializer_range": 0.1}))
        model = build(tmp_path / name, torch.float64).eval()
        cache = TokenCache(model)
        for lengths in ((21, 9), (30, 14), (31, 15)):
            rows = [IDS[0, : lengths[0]].tolist(), IDS[0, 60 - lengths[1] :].tolist()]
            got = cache.logits(rows)
            with torch.no_grad():
                want = torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
            assert (got - want).abs().max() <= 1e-10
