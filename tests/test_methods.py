"""The contract of every method in the registry. A new method is covered without a line here."""

import copy

import pytest
import torch
from conftest import ON_CODES_ONLY, TINY, calibrated, folded, make_folder, method_of, storage_of
from safetensors.torch import load_file, save_file

from litpeft.core.errors import UserError
from litpeft.core.json import read_json
from litpeft.methods import METHODS, method_class
from litpeft.model.build import build
from litpeft.model.config import ModelConfig
from litpeft.model.context import Context, KVCache
from litpeft.model.delta import attach, delta_state, load_delta, trainable, without_delta
from litpeft.model.families.read import config_of
from litpeft.model.gpt import GPT
from litpeft.model.quantize import Storage
from litpeft.model.quantize.quantized import store
from litpeft.model.slots import Delta, Linear

LENGTHS = (9, 15, 8)  # tokens of three documents
PROMPTS = (4, 5, 3)  # tokens of their prompts
IDS = torch.randint(0, TINY["vocab_size"], (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
PROMPTS_OF_VECTORS = {"prefix", "ptuning_v2", "prompt", "ptuning", "pre_embed", "pre_layer"}
LEARNED_TOKENS = {*PROMPTS_OF_VECTORS, "combo"}  # methods that put vectors before the text
TAKEN_OUT = {"pissa", "loftq", "lora_ga", "lq_lora"}  # methods that begin with a part of the weight
MIXED = {"lq_lora"}  # methods that hold some layers in fewer bits than others
NOT_IDENTITY_AT_THE_START = {"reft", "long_lora", *LEARNED_TOKENS, *TAKEN_OUT}  # methods whose papers start elsewhere
ADAPTERS = {"adapter", "adapter_v2", "bottleneck", "adapter_drop"}
NOT_FOLDABLE = {*ADAPTERS, "reft", *LEARNED_TOKENS}  # they act on activations

every_method = pytest.mark.parametrize("name", METHODS)


def base(folder, name: str, dtype: torch.dtype = torch.float64) -> GPT:
    """Returns the base as the method holds it."""
    return build(folder, dtype, storage=storage_of(name))


def make(folder, name: str, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(1)
    return build(folder, dtype, calibrated(method_of(name), folder), storage=storage_of(name))


def forward(model: GPT, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, Context.packed(LENGTHS, ids.device, PROMPTS))


def steps(model: GPT, count: int = 3) -> list[float]:
    torch.manual_seed(2)
    optimizer, losses = torch.optim.AdamW(trainable(model).values(), lr=1e-2), []
    for _ in range(count):
        optimizer.zero_grad()
        at = torch.arange(IDS.numel() - 1)
        loss = model(IDS, Context.packed(LENGTHS, IDS.device, PROMPTS), at=at, targets=IDS[0, 1:]) / len(at)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@every_method
def test_on_a_quantised_base_it_learns_what_it_learns_on_the_weights_that_the_codes_stand_for(
    tiny_folder, name: str
) -> None:
    if name in ON_CODES_ONLY:
        pytest.skip("there is no such twin")
    torch.manual_seed(1)
    twin = build(tiny_folder, torch.float64, method_of(name))
    torch.manual_seed(1)
    if any(isinstance(m, Linear) and m.weight.requires_grad for m in twin.blocks.modules()):
        with pytest.raises(UserError, match="holds in codes: those cannot train"):
            build(tiny_folder, torch.float64, method_of(name), storage=Storage("nf4"))
        return
    model = build(tiny_folder, torch.float64, method_of(name), storage=Storage("nf4"))
    for key, layer in model.blocks.named_modules():
        if isinstance(layer, Linear):
            other = twin.blocks.get_submodule(key)
            other.weight.data = layer.dense()
            method_of(name).start(f"blocks.{key}", other, other.weight, lambda weight: weight, {})
    load_delta(twin, delta_state(model), "test")
    assert steps(model) == steps(twin)
    assert all(torch.equal(tensor, delta_state(twin)[key]) for key, tensor in delta_state(model).items())


@every_method
def test_its_keys_are_fields_of_a_dataclass_of_its_own(name: str) -> None:
    assert "__dataclass_fields__" in vars(method_class(name))


@every_method
def test_base_names_stay_as_they_are(tiny_folder, name: str) -> None:
    assert set(base(tiny_folder, name).state_dict()) <= set(make(tiny_folder, name).state_dict())


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_changes_nothing_at_the_start(tiny_folder, name: str, dtype: torch.dtype) -> None:
    same = torch.equal(forward(make(tiny_folder, name, dtype)), forward(base(tiny_folder, name, dtype)))
    assert same != (name in NOT_IDENTITY_AT_THE_START)


@every_method
def test_only_the_delta_moves(tiny_folder, name: str) -> None:
    model = make(tiny_folder, name)
    before = copy.deepcopy(model.state_dict())
    losses = steps(model)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert losses[-1] < losses[0]
    assert moved
    assert moved <= model.delta_keys


@every_method
def test_every_trainable_tensor_has_a_gradient_after_a_validation_pass(tiny_folder, name: str) -> None:
    model = make(tiny_folder, name)
    with torch.no_grad():
        forward(model)
    steps(model)
    dead = [key for key, p in trainable(model).items() if p.grad is None or not p.grad.any() or p.grad.isnan().any()]
    assert not dead


@every_method
def test_what_trains_is_float32_on_a_bfloat16_base(tiny_folder, name: str) -> None:
    model = make(tiny_folder, name, torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    held = {p.dtype for p in base(tiny_folder, name, torch.bfloat16).parameters()}
    frozen = {key: p.dtype for key, p in model.named_parameters() if not p.requires_grad}
    assert {dtype for key, dtype in frozen.items() if key in model.base_keys} <= held
    assert {dtype for key, dtype in frozen.items() if key not in model.base_keys} <= {torch.float32}
    losses = steps(model, 8)
    assert losses[-1] < losses[0]
    assert forward(model).dtype == torch.bfloat16


@every_method
def test_a_saved_delta_gives_bit_equal_logits(tiny_folder, name: str) -> None:
    model = make(tiny_folder, name)
    steps(model)
    torch.manual_seed(9)
    saved = {key: value.clone() for key, value in delta_state(model).items()}
    fresh = build(tiny_folder, torch.float64, method_of(name), storage=storage_of(name), delta=saved)
    load_delta(fresh, saved, "test")
    assert torch.equal(forward(fresh), forward(model))


@every_method
def test_the_delta_switches_off_and_on(tiny_folder, name: str) -> None:
    trained = make(tiny_folder, name)
    steps(trained)
    model = make(tiny_folder, name)
    load_delta(model, delta_state(trained), "test")
    with torch.no_grad():
        want, plain = forward(model), forward(base(tiny_folder, name))
        with without_delta(model):
            off = forward(model)
        assert torch.equal(forward(model), want)
        if name in TAKEN_OUT:  # put back: as near to the base as codes of the whole weight are
            dense = forward(build(tiny_folder, torch.float64))
            coarsest = forward(build(tiny_folder, torch.float64, storage=Storage("nf2"))) if name in MIXED else plain
            assert (off - dense).norm() <= (coarsest - dense).norm() + 1e-10
        else:
            assert torch.equal(off, plain)
    assert not torch.equal(want, plain)


@pytest.fixture(scope="module", params=["no biases", "biases"])
def either_folder(request, tiny_folder, tmp_path_factory):
    """The tiny Llama, and one whose linear layers have biases that are not zero."""
    if request.param == "no biases":
        return tiny_folder
    folder = make_folder(tmp_path_factory.mktemp("models") / "biased", attention_bias=True, mlp_bias=True)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(".bias"):
            torch.nn.init.normal_(tensors[name], std=0.2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@every_method
def test_fold_equals_forward_or_refuses_by_name(either_folder, name: str) -> None:
    model = make(either_folder, name)
    steps(model)
    with torch.no_grad():
        if name in NOT_FOLDABLE:
            with pytest.raises(TypeError, match="nothing can be merged"):
                folded(model)
            return
        plain, state = build(either_folder, torch.float64), folded(model)
        assert set(plain.state_dict()) <= set(state)
        hf = read_json(either_folder / "config.json", "config.json")
        method_of(name).configure(hf)  # a method may change positions
        with torch.device("meta"):
            described = GPT(config_of(hf, "test")[1])
        plain.config, plain.kinds, plain.kind_of = described.config, described.kinds, described.kind_of
        for key, tensor in state.items():  # and add biases
            module, _, leaf = key.rpartition(".")
            setattr(plain.get_submodule(module), leaf, torch.nn.Parameter(tensor))
        assert (forward(plain) - forward(model)).abs().max() <= 1e-10


@every_method
def test_a_packed_row_gives_each_document_what_it_gets_alone(tiny_folder, name: str) -> None:
    model = make(tiny_folder, name).eval()
    steps(model)
    with torch.no_grad():
        parts = zip(IDS.split(LENGTHS, dim=1), LENGTHS, PROMPTS, strict=True)
        alone = [model(ids, Context.packed((n,), ids.device, (prompt,))) for ids, n, prompt in parts]
        assert (torch.cat(alone, 1) - forward(model)).abs().max() <= 1e-10


@every_method
def test_cached_decoding_equals_the_full_forward(tiny_folder, name: str) -> None:
    model = make(tiny_folder, name).eval()
    steps(model)
    ids = IDS.view(2, 16)
    with torch.no_grad():
        want = model(ids)
        cache = [KVCache(2, 16, model.config, torch.float64, "cpu") for _ in model.blocks]
        parts = [(0, 8), *((t, t + 1) for t in range(8, 16))]
        pos = torch.arange(16).expand(2, -1)
        got = [model(ids[:, a:b], Context(pos[:, a:b], cache=cache, end=b)) for a, b in parts]
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-10)


# Their blocks compute what those of lora, of prefix and of prompt do; blocks of the others are in test_compiled.py.
ALIKE = ("lora_fa", "pissa", "loftq", "eva", "lora_ga", "lq_lora", "ptuning_v2", "ptuning")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALIKE else pytest.mark.full) for n in METHODS])
def test_it_compiles_without_a_graph_break(tiny_folder, name: str) -> None:
    torch._dynamo.reset()
    model = make(tiny_folder, name)
    steps(model)
    compiled = torch.compile(lambda ids: forward(model, ids), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(IDS), forward(model), atol=1e-10)


@every_method
def test_it_attaches_on_the_meta_device(tiny_folder, name: str) -> None:
    made = make(tiny_folder, name)
    with torch.device("meta"):
        model = GPT(made.config)
        if storage_of(name) is not None:
            store(model, storage_of(name).name, True, torch.float64)
        attach(model, method_of(name))
    assert all(value.is_meta for value in model.state_dict().values())
    assert model.delta_keys == made.delta_keys


@every_method
def test_activation_checkpointing_gives_the_same_delta(tiny_folder, name: str) -> None:
    states = []
    for recompute in ("none", "cheap", "block", "offload"):
        model = make(tiny_folder, name)
        model.recompute = recompute
        steps(model, 2)
        states.append(delta_state(model))
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in state)


@every_method
def test_no_delta_holds_a_delta(tiny_folder, name: str) -> None:
    deltas = [m for m in make(tiny_folder, name).modules() if isinstance(m, Delta)]
    assert not any(isinstance(child, Delta) for delta in deltas for child in list(delta.modules())[1:])


A_AND_B_LOW_RANK = {"A": ("low_rank",), "B": ("low_rank",), "C": ("none",), "D": ("none",), "E": ("none",)}
LLAMA_7B = ModelConfig(
    vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=11008, max_positions=2048
)


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("lora", {"rank": 8, "targets": ("*.attn.q", "*.attn.v")}, 4_194_304),
        ("lora", {"rank": 16}, 39_976_960),
        ("lora", {"rank": 64}, 159_907_840),
        ("dora", {"rank": 32, "targets": ("*.attn.q", "*.attn.k", "*.attn.v", "*.mlp.up", "*.mlp.down")}, 56_975_360),
        ("dora", {"rank": 16, "targets": ("*.attn.q", "*.attn.k", "*.attn.v", "*.mlp.up", "*.mlp.down")}, 28_925_952),
        ("lora", {"targets": ("*.attn.*",)}, 8_388_608),
        ("lora_fa", {"targets": ("*.attn.q", "*.attn.v")}, 2_097_152),
        ("pissa", {"targets": ("*.attn.q", "*.attn.v")}, 4_194_304),
        ("ada_lora", {"targets": ("*.attn.q", "*.attn.v")}, 6_292_224),
        ("eva", {"targets": ("*.attn.q", "*.attn.v")}, 4_194_304),
        ("lora_ga", {"targets": ("*.attn.q", "*.attn.v")}, 4_194_304),
        ("glora", {"targets": ("*.attn.q", "*.attn.v"), "forms": A_AND_B_LOW_RANK}, 8_388_608),
        ("multi_lora", {"rank": 8, "targets": ("*.attn.*",)}, 26_738_688),
        ("lora", {"rank": 24, "targets": ("*.attn.*",)}, 25_165_824),
        ("long_lora", {"targets": ("*.attn.*",)}, 8_388_608 + 266_240 + 131_072_000),
        ("tied_lora", {}, 524_544),
        ("tied_lora", {"train": "AB"}, 131_072),
        ("tied_lora", {"train": "uv"}, 393_472),
        ("tied_lora", {"rank": 128}, 2_494_464),
        ("vera", {"targets": ("*.attn.q", "*.attn.v")}, 278_528),
        ("vera", {}, 1_417_216),
        ("vera", {"rank": 1024}, 1_589_248),
        ("ia3", {}, 614_400),
        ("bitfit", {"add_missing": True}, 1_359_872),
        ("selective", {}, 266_240),
        ("bottleneck", {"reduction_factor": 64}, 33_820_672),
        ("bottleneck", {"kind": "pfeiffer", "inner": 64}, 16_910_336),
        ("bottleneck", {"kind": "lin", "inner": 64}, 17_172_480),
        ("bottleneck", {"kind": "pfeiffer", "inner": 64, "skip_layers": 5}, 14_268_096),
        ("adapter_drop", {"inner": 64}, 16_910_336),
        ("prefix", {}, 2_621_440),
        ("prefix", {"prompt_length": 30}, 7_864_320),
        ("prefix", {"prompt_length": 30, "hidden": 512}, 136_700_416),
        ("prefix", {"prompt_length": 30, "hidden": 4096}, 1_090_908_160),
        ("ptuning_v2", {"prompt_length": 30}, 7_864_320),
        ("prompt", {}, 81_920),
        ("ptuning", {"after": (), "hidden": 128}, 1_151_232),
        ("ptuning", {"after": (), "hidden": 128, "encoder": "lstm"}, 5_923_072),
        ("reft", {"rank": 8}, 2_097_408),  # 0.031 % in the paper
        ("reft", {"layers": (3, 9, 18, 24), "tied": False}, 262_176),  # 0.0039 %
        ("reft", {"layers": (15,)}, 32_772),  # pyreft prints 0.000486 %
        ("adapter", {}, 1_229_760),
        ("adapter_v2", {}, 4_215_744),
        ("adapter_v2", {"targets": ("*.attn.*", "*.mlp.*", "head")}, 4_279_744),
        ("full", {}, 6_738_415_616),
    ],
)
def test_parameter_counts_on_llama_7b_are_those_of_the_papers(name: str, settings: dict, count: int) -> None:
    with torch.device("meta"):
        model = GPT(LLAMA_7B)
        attach(model, method_class(name)(**settings))
    assert sum(p.numel() for p in trainable(model).values()) == count
    assert sum(p.numel() for n, p in model.named_parameters() if n in model.base_keys) == 6_738_415_616


QV = ("*.attn.q", "*.attn.v")
NO_OUTPUTS = ("*.attn.q", "*.attn.k", "*.attn.v", "*.mlp.up", "*.mlp.down")  # of DoRA's scripts
SHAPES = {  # vocabulary, width, layers, heads, key and value heads, their size, width of the MLP
    "LLaMA-7B": (32000, 4096, 32, 32, 32, 128, 11008),
    "LLaMA-13B": (32000, 5120, 40, 40, 40, 128, 13824),
    "LLaMA-65B": (32000, 8192, 80, 64, 64, 128, 22016),
    "LLaMA-3-8B": (128256, 4096, 32, 32, 8, 128, 14336),
    "GPT-3": (50257, 12288, 96, 96, 96, 128, 49152),
    "T5-XXL": (32128, 4096, 24, 64, 64, 64, 10240),
    "GPT-2": (50257, 768, 12, 12, 12, 64, 3072),
    "GPT-2 medium": (50257, 1024, 24, 16, 16, 64, 4096),
    "GPT-2 large": (50257, 1280, 36, 20, 20, 64, 5120),
    "BERT": (30522, 768, 12, 12, 12, 64, 3072),  # as many norms as GPT-2: two a block, and one for the embeddings
    "RoBERTa base": (50265, 768, 12, 12, 12, 64, 3072),
    "RoBERTa large": (50265, 1024, 24, 16, 16, 64, 4096),
    "DeBERTa XXL": (128100, 1536, 48, 24, 24, 64, 6144),
}
PARAMETERS = {
    "LLaMA-7B": 6_738_415_616,
    "LLaMA-13B": 13_015_864_320,
    "LLaMA-65B": 65_285_660_672,
    "LLaMA-3-8B": 8_030_261_248,
}


@pytest.mark.parametrize(
    ("shape", "name", "settings", "count", "percent"),
    [
        ("LLaMA-7B", "lora", {"targets": QV}, 4_194_304, "0.0622"),
        ("LLaMA-7B", "lora", {"targets": ("*.attn.*", "*.mlp.*", "head")}, 20_277_248, None),
        ("LLaMA-7B", "lora", {"rank": 32, "targets": NO_OUTPUTS}, 56_098_816, "0.826"),
        ("LLaMA-7B", "dora", {"rank": 32, "targets": NO_OUTPUTS}, 56_975_360, "0.8384"),
        ("LLaMA-7B", "dora", {"rank": 16, "targets": NO_OUTPUTS}, 28_925_952, "0.427"),
        ("LLaMA-13B", "lora", {"targets": QV}, 6_553_600, None),
        ("LLaMA-13B", "dora", {"rank": 32, "targets": NO_OUTPUTS}, 89_190_400, "0.6806"),
        ("LLaMA-3-8B", "lora", {"targets": QV}, 3_407_872, None),
        ("LLaMA-3-8B", "dora", {"rank": 32, "targets": NO_OUTPUTS}, 57_409_536, "0.7098"),
        ("LLaMA-65B", "full", {}, 65_285_660_672, None),
        ("GPT-3", "lora", {"rank": 1, "targets": QV}, 4_718_592, None),
        ("GPT-3", "lora", {"rank": 4, "targets": QV}, 18_874_368, None),
        ("GPT-3", "lora", {"rank": 8, "targets": QV}, 37_748_736, None),
        ("GPT-3", "lora", {"rank": 8, "targets": ("*.attn.q",)}, 18_874_368, None),
        ("GPT-3", "lora", {"rank": 2, "targets": ("*.attn.*",)}, 18_874_368, None),
        ("RoBERTa base", "lora", {"targets": QV}, 294_912, None),
        ("RoBERTa large", "lora", {"targets": QV}, 786_432, None),
        ("DeBERTa XXL", "lora", {"rank": 16, "targets": QV}, 4_718_592, None),
        ("GPT-2 medium", "lora", {"rank": 4, "targets": QV}, 393_216, None),
        ("GPT-2 large", "lora", {"rank": 4, "targets": QV}, 737_280, None),
        ("BERT", "bottleneck", {"inner": 64}, 2_379_264, None),
        ("BERT", "bottleneck", {"inner": 8}, 313_536, None),
        ("BERT", "bottleneck", {"inner": 256}, 9_461_760, None),
        ("BERT", "bottleneck", {"inner": 64, "unfreeze": ("*norm*",)}, 2_417_664, None),
        ("GPT-3", "bottleneck", {"inner": 1}, 7_078_080, None),  # 7.1M and 40.1M in the LoRA paper
        ("GPT-3", "bottleneck", {"inner": 8}, 40_109_568, None),
        (
            "GPT-2 medium",
            "bottleneck",
            {"kind": "lin", "inner": 6},
            368_784,
            None,
        ),  # 0.37M, 11.09M, 0.88M in the LoRA paper
        ("GPT-2 medium", "bottleneck", {"kind": "lin", "inner": 224}, 11_089_152, None),
        ("GPT-2 large", "bottleneck", {"kind": "lin", "inner": 8}, 875_808, None),
        ("GPT-2", "bottleneck", {"kind": "lin", "inner": 10}, 212_088, None),
        ("GPT-2", "bottleneck", {"kind": "lin", "inner": 100}, 1_872_048, None),
        ("GPT-2", "bottleneck", {"kind": "lin", "inner": 300}, 5_560_848, None),
        ("LLaMA-3-8B", "prefix", {"prompt_length": 30}, 1_966_080, None),
        ("GPT-2 medium", "prefix", {}, 491_520, None),
        ("T5-XXL", "prompt", {"prompt_length": 100}, 409_600, None),
        ("GPT-2", "bitfit", {}, 102_144, None),
        ("LLaMA-13B", "reft", {"rank": 8}, 3_277_120, None),
        ("LLaMA-3-8B", "reft", {"rank": 8}, 2_097_408, None),  # 0.026 % of 8,030,261,248 in the paper
        ("GPT-3", "pre_embed", {"prefix_length": 256, "infix_length": 8}, 3_244_032, None),  # 3.2M in the LoRA paper
        ("GPT-3", "pre_layer", {"prefix_length": 8, "infix_length": 8}, 18_874_368, None),
    ],
)
def test_parameter_counts_on_other_models_are_those_of_the_papers(
    shape: str, name: str, settings: dict, count: int, percent: str | None
) -> None:
    """A percentage is of all parameters, those of the method among them, as the papers count."""
    plain = {"norm": "layer", "gated_mlp": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True}
    with torch.device("meta"):
        model = GPT(ModelConfig(*SHAPES[shape], 2048, **({} if shape in PARAMETERS else plain)))
        attach(model, method_class(name)(**settings))
    assert sum(p.numel() for p in trainable(model).values()) == count
    if shape in PARAMETERS:
        assert sum(p.numel() for n, p in model.named_parameters() if n in model.base_keys) == PARAMETERS[shape]
    if percent is not None:
        digits = len(percent.partition(".")[2])
        assert f"{100 * count / (PARAMETERS[shape] + count):.{digits}f}" == percent
