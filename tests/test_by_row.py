"""Several runs beside one base in one pass: every row gets what its own run gives it alone."""

from pathlib import Path

import pytest
import torch
from conftest import ON_CODES_ONLY, make_folder
from saved_runs import HELD, base_reads, make_base, save_run

from litpeft.core.errors import UserError
from litpeft.data.tokenizer import Tokenizer
from litpeft.generate.batch import Batch, Request
from litpeft.generate.cache import TokenCache
from litpeft.generate.cpu.fused_block import FusedBlock
from litpeft.generate.draft import Draft
from litpeft.generate.engine import answer
from litpeft.generate.load import load_model
from litpeft.generate.served import Served, load_served
from litpeft.generate.settings import Sampling, Serve
from litpeft.methods import METHODS
from litpeft.methods.lora import LoRA
from litpeft.model.added_tokens import note_tokens
from litpeft.model.affine import Affine
from litpeft.model.build import build
from litpeft.model.by_row import ByRow, Stacked, affine_maps, deltas_beside
from litpeft.model.context import Context
from litpeft.model.delta import delta_state
from litpeft.model.gpt import GPT
from litpeft.model.kernels import library
from litpeft.model.slots import Linear

APART = {  # what has no place beside the base, or another base
    "weights of its own": {"full", "selective"},
    "norms": {"adapter_v2"},
    "other weights in the base": {"pissa", "lora_ga", "loftq", "lq_lora"},
    "other slots": {"long_lora", "adapter", "bottleneck", "adapter_drop", "reft", "combo"}
    | {"prefix", "ptuning_v2", "prompt", "ptuning", "pre_embed", "pre_layer"},
}
TOGETHER = set(METHODS) - set().union(*APART.values())


def rows_for(names: list[str]) -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(0, 250, (5 + 3 * number,)).tolist() for number in range(len(names))]


@pytest.fixture(scope="module", params=HELD)
def saved(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[str]]:
    """Returns how a base is held, the folder of its runs, one of each method that can be on it, and their names."""
    kind, folder = request.param, tmp_path_factory.mktemp("runs")
    base, saved = make_base(folder / "base"), []
    reads = base_reads(base)
    for name in METHODS:
        try:
            save_run(folder / name, name, kind, base, reads)
        except pytest.skip.Exception:
            continue
        saved.append(name)
    return kind, folder, saved


@pytest.fixture(scope="module", params=[ByRow, Stacked])
def served(request, saved: tuple[str, Path, list[str]]) -> tuple[str, Path, dict[str, Served]]:
    kind, folder, names = saved
    if request.param is Stacked and kind in ("bf16", "nf4"):
        pytest.skip("for a GPU: the C++ kernels read the maps of ByRow")
    first, *others = [str(folder / name) for name in names]
    settings = Serve(first, also=tuple(others), precision=HELD[kind][0], batch_size=len(names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litpeft.model.by_row.ByRow", request.param)
        return kind, folder, load_served(settings)[0]


def test_a_run_is_beside_its_base_if_all_it_does_is_an_affine_map_in_linear_layers(served) -> None:
    kind, _, models = served
    beside = {name for name, one in models.items() if one.adapter}
    assert beside == TOGETHER & models.keys()
    assert models["base"].adapter == 0
    assert models["base"].batch is models["lora"].batch
    apart = [one.batch for name, one in models.items() if name not in {*beside, "base"}]
    assert len({id(batch) for batch in [*apart, models["lora"].batch]}) == len(apart) + 1
    assert len(models) == 1 + len(METHODS) - {"float64": 3, "float32": 3, "bf16": 3, "nf4": 2}[kind]


def test_rows_of_all_methods_in_one_pass_get_the_logits_of_their_runs_alone(served) -> None:
    kind, folder, models = served
    precision, _, limit = HELD[kind]
    batch = models["lora"].batch
    names = [name for name, one in models.items() if one.batch is batch and name != "base"]
    cache, rows = TokenCache(batch.model), rows_for(names)
    cache.adapters = [models[name].adapter for name in names]
    alone = [TokenCache(load_model(str(folder / name), precision=precision).model) for name in names]
    for _ in range(3):
        got = cache.logits(rows)
        for number, name in enumerate(names):
            (want,) = alone[number].logits([rows[number]])
            assert (got[number] - want).norm() <= 2 * limit * want.norm(), name  # both are within it of the plain model
        rows = [[*row, 7 + number] for number, row in enumerate(rows)]
    cache.adapters = [models[names[0]].adapter] * len(names)  # the rows are the same, the runs are not
    cache.rows = [[] for _ in names]
    others = cache.logits(rows)
    assert all((others[n] - got[n]).norm() > 3 * limit * got[n].norm() for n in range(1, len(names)))


def test_rows_of_the_base_get_the_logits_of_the_base(served) -> None:
    kind, folder, models = served
    precision, quantize, limit = HELD[kind]
    model = models["base"].batch.model
    plain = load_model(str(folder / "base"), precision=precision, quantize=quantize).model
    rows = rows_for(["", "", ""])
    want = TokenCache(plain).logits(rows)
    for adapters in ([0, 0, 0], []):
        cache = TokenCache(model)
        cache.adapters = adapters
        assert (cache.logits(rows) - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("part", [3, 512])
def test_requests_that_come_and_go_get_the_answers_of_their_runs(served, part: int) -> None:
    kind, folder, models = served
    if kind in ("bf16", "nf4"):
        pytest.skip("near ties fall as a type rounds")
    names = ["lora", "ia3", "base", "dora", "lora", "bitfit", "base", "ia3"]
    batch, requests = Batch(models["lora"].batch.model, 3, part), []
    for number, (name, prompt) in enumerate(zip(names, rows_for(names), strict=True)):
        sampling = Sampling(temperature=0.5 * (number % 2), max_new_tokens=2 + 5 * (number % 3), seed=number)
        draft = Draft(prompt, models[name].loaded.tokenizer, sampling, (), sampling.max_new_tokens)
        requests.append(Request(draft, sampling, models[name].adapter))
    coming = list(requests)
    while coming or batch.count:
        batch.waiting.extend(coming[:1])
        del coming[:1]
        batch.step()
    for name, prompt, request in zip(names, rows_for(names), requests, strict=True):
        one = load_model(str(folder / name), precision=HELD[kind][0])
        seeds = [request.sampling.seed]
        assert answer(one.model, [prompt], one.tokenizer, request.sampling, (), seeds) == [request.draft.answer], name


def test_a_recorded_step_has_the_runs_of_its_rows(served, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _, models = served
    batch, limit = models["lora"].batch, HELD[kind][2]
    monkeypatch.setattr("litpeft.generate.cuda_graph.record", lambda step: step)
    caches, rows = (TokenCache(batch.model, 3), TokenCache(batch.model, 3)), rows_for(["", "", ""])
    caches[0].records = True  # as on a GPU
    for step in range(4):
        for cache in caches:
            if step == 2:  # other runs in the rows of a step that has been recorded
                cache.rows, cache.adapters = [[], [], []], [models[name].adapter for name in ("ia3", "base", "lora")]
            elif not step:
                cache.adapters = [models[name].adapter for name in ("lora", "dora", "base")]
        got, want = (cache.logits(rows) for cache in caches)
        assert (got - want).norm() <= limit * want.norm()
        rows = [[*row, 7 + step] for row in rows]
    assert caches[0].recorded
    assert not caches[1].recorded


@pytest.mark.skipif(library() is None, reason="this machine has no AVX-512 BF16 or no g++")
@pytest.mark.parametrize(
    ("kind", "names"), [("bf16", ["lora", "dora", "ia3", "eva", "bitfit"]), ("nf4", ["lora", "dora", "eva"])]
)
def test_rows_of_several_runs_have_the_bits_of_each_run_alone(kind: str, names: list[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    base = make_folder(tmp_path / "base", initializer_range=0.1, **sizes)
    reads = base_reads(base)
    for name in names:
        save_run(tmp_path / name, name, kind, base, reads)
    first, *others = [str(tmp_path / name) for name in names]
    models, _ = load_served(Serve(first, also=tuple(others), precision="bf16-true"))
    model = models["base"].batch.model
    assert all(type(block) is FusedBlock and "by row" in block.native for block in model.blocks)
    alone = [TokenCache(load_model(str(tmp_path / name), precision="bf16-true").model) for name in names]

    def check(model: GPT, adapters: list[int]) -> None:
        cache, rows = TokenCache(model), rows_for(names)
        cache.adapters = adapters
        for _ in range(3):
            got = cache.logits(rows)
            for number, name in enumerate(names):
                assert torch.equal(got[number], alone[number].logits([rows[number]])[0]), name
            rows = [[*row, 7 + number] for number, row in enumerate(rows)]

    check(model, [models[name].adapter for name in names])
    quantize = None if kind == "bf16" else kind
    later = Serve(str(base), precision="bf16-true", quantize=quantize, runs=str(tmp_path), runs_held=len(names))
    _, grown = load_served(later)
    for places in (grown.places, grown.places[::-1]):  # each in a place of its own, and then in another's
        for name, place in zip(names, places, strict=True):
            grown.put(place, grown.read(tmp_path / name)[1])
        check(grown.model, list(places))


def test_a_run_with_more_than_affine_maps_in_layers_that_know_their_row_is_apart(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    model = build(base, torch.float32)
    for method in (
        LoRA(targets=("*.q", "head")),
        LoRA(unfreeze=("norm.weight",)),
        LoRA(add_tokens=("<|new|>",)),
        LoRA(targets=("*.q",)),
    ):
        if method.add_tokens:
            note_tokens(method, Tokenizer.load(base))
        tuned = build(base, torch.float32, method)
        delta = delta_state(tuned)
        alone = deltas_beside(model.config, method, None, delta)
        assert (alone is not None) == (method.targets == ("*.q",)), method
    maps = affine_maps(model, alone, method, delta)
    assert set(maps) == {f"blocks.{layer}.attn.q" for layer in range(len(model.blocks))}


@pytest.mark.parametrize("kind", [ByRow, Stacked])
def test_a_place_holds_one_run_after_another_and_changes_no_other(kind: type[ByRow]) -> None:
    torch.manual_seed(0)
    linear, rows = Linear(6, 5).double(), 3
    wide = Affine(torch.randn(5), torch.randn(4, 6), torch.randn(5, 4), torch.randn(5))
    thin = Affine(None, torch.randn(1, 6), torch.randn(5, 1), None)
    shifting = Affine(shift=torch.randn(5))
    delta = kind(2, torch.empty(0, dtype=torch.float64))
    x = torch.randn(rows, 3, 6, dtype=torch.float64)
    y, ctx = linear(x), Context.rows(torch.zeros(rows, 3))
    ctx.adapter = torch.tensor([2, 0, 1])
    held, moves = [Affine(), Affine(), Affine()], []
    for number, one in ((1, thin), (2, shifting), (1, wide), (2, thin), (2, wide), (1, Affine()), (1, shifting)):
        moves.append(delta.put(number, one))
        held[number] = one
        got, before = delta(y, x, linear, ctx), y.clone()
        for row, run in enumerate(ctx.adapter.tolist()):
            own, want = held[run], y[row]
            want = want if own.gain is None else own.gain * want
            want = want if own.A is None else want + x[row] @ own.A.double().T @ own.B.double().T
            want = want if own.shift is None else want + own.shift
            torch.testing.assert_close(got[row], want, rtol=1e-12, atol=1e-12)
        assert torch.equal(y, before)
    assert moves == [kind is Stacked and n < 3 for n in range(7)]  # one more term, or a larger rank
    ctx.adapter = None
    assert delta(y, x, linear, ctx) is y


@pytest.mark.parametrize("kind", [ByRow, Stacked])
def test_a_run_that_comes_later_gets_the_logits_of_its_run_alone(saved, kind: type[ByRow], monkeypatch) -> None:
    how, folder, names = saved
    if kind is Stacked and how in ("bf16", "nf4"):
        pytest.skip("for a GPU: the C++ kernels read the maps of ByRow")
    precision, quantize, limit = HELD[how]
    monkeypatch.setattr("litpeft.model.by_row.ByRow", kind)
    settings = Serve(str(folder / "base"), precision=precision, quantize=quantize, runs=str(folder), runs_held=2)
    models, base = load_served(settings)
    assert list(models) == ["base"]
    assert list(base.places) == [1, 2]
    cache, held, rows = TokenCache(base.model), {}, rows_for(["", ""])
    for number, name in enumerate(names):
        if name not in TOGETHER or (how == "nf4" and name in ON_CODES_ONLY):  # on integers
            with pytest.raises(UserError, match="is a model by itself|is not computed beside a base|on a base in"):
                base.put(1, base.read(folder / name)[1])
            continue
        place = 1 + number % 2
        loaded, maps = base.read(folder / name)
        assert loaded.run.facts["method"] == name
        base.put(place, maps)
        held[place] = TokenCache(load_model(str(folder / name), precision=precision).model)
        cache.adapters, cache.rows = [1, 2], [[], []]
        got = cache.logits(rows)
        for place, alone in held.items():
            want = alone.logits([rows[place - 1]])
            assert (got[place - 1] - want).norm() <= 2 * limit * want.norm(), name
    cache.adapters, cache.rows = [0, 0], [[], []]
    want = TokenCache(load_model(str(folder / "base"), precision=precision, quantize=quantize).model).logits(rows)
    assert (cache.logits(rows) - want).norm() <= limit * want.norm()


def test_a_base_that_is_named_is_the_one_that_is_held_for_its_runs(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    save_run(tmp_path / "lora", "lora", "float32", base, base_reads(base))
    save_run(tmp_path / "prefix", "prefix", "float32", base, base_reads(base))
    others = (str(tmp_path / "lora"), str(tmp_path / "prefix"))
    models, _ = load_served(Serve(str(base), also=others, precision="32-true"))
    assert list(models) == ["base", "lora", "prefix"]
    assert [models[name].adapter for name in models] == [0, 1, 0]
    assert models["base"].batch is models["lora"].batch
    assert models["base"].batch is not models["prefix"].batch
    assert list(load_served(Serve(others[1], precision="32-true"))[0]) == ["prefix"]
