"""GGUF files that are written: llama.cpp and transformers compute with them what litpeft computes."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
from chat_samples import STYLES, sentencepiece_model, write_folder
from conftest import finetune, make_folder
from families.tiny_families import MODELS, make_family
from llama_cpp import ask, complete, greedy, next_token, of_model, server, write_bpe
from test_model import CASES, YARN, longrope
from tiny_gguf import strings
from tokenizers import processors
from transformers import AutoModelForCausalLM

from litpeft.cli import main
from litpeft.core.errors import ConfigError, ModelError
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.convert import convert
from litpeft.exchange.merge import merge
from litpeft.exchange.settings import Convert, Merge
from litpeft.generate.load import load_model
from litpeft.model.build import build
from litpeft.model.families import FAMILIES, family

ROWS = 320
PROMPTS = [torch.randint(3, 250, (size,), generator=torch.Generator().manual_seed(size)).tolist() for size in (5, 60)]
LEARN = "--train.epochs", "3", "--train.lr", "1e-2"
GELU = 2e-3  # llama.cpp looks its GELU up in a table of float16
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "pad_token_id": 0, "sliding_window": 100}
OF_27B = {"num_attention_heads": 2, "query_pre_attn_scalar": 32, "pad_token_id": 0, "sliding_window": 100}
WINDOW = {"model_type": "mistral", "sliding_window": 100}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 100,
    "head_dim": 16,
    "rope_parameters": YARN,
}
LITE = CASES["deepseek_v3"] | {"q_lora_rank": None, "num_hidden_layers": 27, "norm_topk_prob": False}
M3 = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
TURNS = {"num_hidden_layers": 5, "sliding_window": 30}  # three layers with a window, one without, one with
EXAONE4 = {
    "model_type": "exaone4",
    "num_hidden_layers": 5,
    "sliding_window": None,
    "layer_types": ["full_attention"] * 5,
    "rope_parameters": CASES["rope llama3"]["rope_parameters"],
}
OLMO3 = {"model_type": "olmo3", "rope_scaling": YARN | {"rope_theta": 500_000.0}} | TURNS
LINEAR = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_value_heads": 6}
SHORT = {"conv_bias": False, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
LINEAR |= {"linear_num_key_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
HYBRID = CASES["granitemoehybrid"] | {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3}
HYBRID |= {"num_local_experts": 0, "mamba_d_state": 16}
WRITTEN = {
    "llama": (CASES["grouped queries"], 1e-5),
    "llama, wide heads": (CASES["one key head, wide heads"], 1e-5),
    "llama, tied": (CASES["tied embeddings"], 1e-5),
    "llama, biases": (CASES["biases"], 1e-5),
    "llama3": (CASES["rope llama3"], 1e-5),
    "llama, linear": (CASES["rope linear"], 1e-5),
    "mistral": (WINDOW, 1e-5),
    "gpt_neox": (CASES["gpt_neox, parallel, a quarter rotates"], GELU),
    "gpt_neox, serial": (CASES["gpt_neox, serial, all rotates"], GELU),
    "gpt_neox, tied": ({"model_type": "gpt_neox", "tie_word_embeddings": True}, GELU),
    "gpt2": ({"model_type": "gpt2", "n_inner": 256, "n_positions": 1024}, GELU),  # as transformers' reader has it
    "qwen2": (CASES["qwen2, tied, no window"], 1e-5),
    "qwen3": (CASES["qwen3"], 1e-5),
    "qwen3_5_text": (CASES["qwen3_5_text"] | LINEAR, 1e-5),
    "qwen3_5_moe_text": (CASES["qwen3_5_moe_text"] | LINEAR, 1e-5),
    "qwen3_next": (CASES["qwen3_next"] | LINEAR, 1e-5),
    "lfm2": (CASES["lfm2"] | SHORT, 1e-5),
    "gemma": (CASES["gemma"], GELU),
    "gemma2": ({"model_type": "gemma2", "num_hidden_layers": 4} | GEMMA, 5 * GELU),
    "gemma3_text": (
        {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window_pattern": 6} | GEMMA,
        10 * GELU,
    ),
    "gemma4_text": (CASES["gemma4_text"] | {"sliding_window": 100}, 5 * GELU),
    "gemma4_text, values are keys": (
        CASES["gemma4_text, values are keys, few global heads"] | {"sliding_window": 100},
        5 * GELU,
    ),
    "gemma2, 27B": ({"model_type": "gemma2", "num_hidden_layers": 46, "head_dim": 16} | OF_27B, 0.1),
    "gemma3_text, 27B": ({"model_type": "gemma3_text", "num_hidden_layers": 62, "head_dim": 16} | OF_27B, 0.1),
    "phi3": (CASES["phi3"] | {"sliding_window": 100}, 1e-5),
    "smollm3": ({"model_type": "smollm3", "num_hidden_layers": 5, "pad_token_id": 0}, 1e-5),
    "olmo2": (CASES["olmo2"], 1e-5),
    "olmo": (CASES["olmo"], 1e-5),
    "olmo3": (OLMO3, 1e-5),
    "granite": (CASES["granite"], 1e-5),
    "granitemoe": (CASES["granitemoe"], 1e-5),
    "granitemoehybrid": (CASES["granitemoehybrid, no experts, tied"], 1e-5),
    "granitemoehybrid, Mamba": (HYBRID, 1e-5),
    "granitemoehybrid, Mamba and experts": (
        HYBRID | {"num_local_experts": 4, "position_embedding_type": "rope"},
        1e-5,
    ),
    "starcoder2": (CASES["starcoder2"] | {"sliding_window": 100}, GELU),
    "stablelm": (CASES["stablelm"], 1e-5),
    "stablelm, parallel": (CASES["stablelm, parallel"], 1e-5),
    "stablelm, norms of each head": (CASES["stablelm, norms of each head"], 1e-5),
    "phi": (CASES["phi"], GELU),
    "falcon": (CASES["falcon"], GELU),
    "falcon, new": (CASES["falcon, new, two norms"] | {"tie_word_embeddings": False}, GELU),
    "falcon, new, one norm": (CASES["falcon, new, one norm"] | {"bias": False}, GELU),
    "glm": (CASES["glm"], 1e-5),
    "glm4": (CASES["glm4"] | {"head_dim": 32}, 1e-5),
    "glm4_moe": (CASES["glm4_moe"] | {"n_group": 1, "topk_group": 1}, 1e-5),
    "glm4_moe, no norms": (CASES["glm4_moe, Air"] | {"head_dim": 32}, 1e-5),
    "cohere2": ({"model_type": "cohere2", "logit_scale": 0.3, "pad_token_id": 0} | TURNS, 1e-5),
    "cohere": ({"model_type": "cohere", "use_qk_norm": False, "pad_token_id": 0}, 1e-5),
    "cohere, R+": ({"model_type": "cohere", "use_qk_norm": True, "pad_token_id": 0, "num_hidden_layers": 64}, 1e-5),
    "nemotron": (CASES["nemotron"], 2e-5),
    "mixtral": (CASES["mixtral"], 1e-5),
    "qwen2_moe": (CASES["qwen2_moe"], 1e-5),
    "qwen3_moe": (CASES["qwen3_moe"] | {"norm_topk_prob": True}, 1e-5),
    "olmoe": (CASES["olmoe"] | {"num_key_value_heads": 4}, 1e-5),
    "gpt_oss": (GPT_OSS, 1e-5),
    "ministral": (CASES["ministral"] | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 100}, 1e-5),
    "ministral3": (CASES["ministral3"] | {"rope_parameters": M3 | {"llama_4_scaling_beta": 0.1}}, 1e-5),
    "ministral3, other sizes": (
        CASES["ministral3"] | {"rope_parameters": M3 | {"llama_4_scaling_beta": 0.2, "mscale_all_dim": 1.3}},
        1e-5,
    ),
    "hunyuan_v1_dense": (CASES["hunyuan_v1_dense"], 1e-5),
    "exaone4": (EXAONE4, 1e-5),
    "exaone4, 32B": (EXAONE4 | {"num_hidden_layers": 64, "sliding_window": 30, "layer_types": None}, 2e-5),
    "seed_oss": (CASES["seed_oss"] | {"attention_out_bias": False, "mlp_bias": False}, 1e-5),
    "seed_oss, no biases": ({"model_type": "seed_oss", "head_dim": 16, "attention_bias": False}, 1e-5),
    "ernie4_5_moe": (CASES["ernie4_5_moe"], 1e-5),
    "ernie4_5": (CASES["ernie4_5"] | {"use_bias": False, "head_dim": 32}, 1e-5),
    "deepseek_v3": (CASES["deepseek_v3"] | {"rope_parameters": M3}, 1e-5),
    "deepseek_v3, 27 layers": (LITE | {"n_group": 1, "topk_group": 1}, 2e-5),
    "deepseek_v2": (CASES["deepseek_v2"], 1e-5),
    "yarn": (CASES["yarn"], 1e-5),
    "yarn, sizes": ({"rope_parameters": YARN | {"attention_factor": 0.9, "beta_fast": 8.0}}, 1e-5),
    "qwen2, yarn": ({"model_type": "qwen2", "rope_parameters": YARN}, 1e-5),
    "longrope within": ({"rope_parameters": longrope(256)}, 1e-5),
    "longrope beyond": (CASES["longrope beyond"], 1e-5),
    "phi3, longrope": (CASES["phi3, longrope"], 1e-5),
}
LONG = ("gemma2, 27B", "gemma3_text, 27B", "cohere, R+", "deepseek_v3, 27 layers", "exaone4, 32B", "glm4_moe, no norms")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in WRITTEN]
BEYOND = (
    "longrope beyond",
    "phi3, longrope",
)  # only the longer prompt is beyond the original length, as the context is


def written(folder: Path, out: Path, **settings: object) -> Path:
    """Returns the GGUF file that convert makes of a folder."""
    convert(Convert(str(folder), str(out), to="gguf", **settings))
    return out / "model.gguf"


MADE: dict[str, tuple[Path, Path]] = {}


def made(tmp_path_factory, name: str) -> tuple[Path, Path]:
    """Returns the folder of a model in WRITTEN and its file in f32, made once for all tests."""
    if name not in MADE:
        folder = tmp_path_factory.mktemp("made")
        with pytest.MonkeyPatch.context() as patch:
            base = make(folder / "base", patch, WRITTEN[name][0])
        MADE[name] = base, written(base, folder / "out", type="f32")
    return MADE[name]


def make(folder: Path, monkeypatch, changes: dict) -> Path:
    monkeypatch.setitem(MODELS, "this", changes)
    make_family(folder, "this")
    return write_bpe(folder)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_what_litpeft_computes(tmp_path_factory, name: str) -> None:
    (base, file), limit = made(tmp_path_factory, name), WRITTEN[name][1]
    model = build(base, torch.float32)
    with server(file) as client:  # which takes longrope's short factors up to a context of 256
        for prompt in PROMPTS[-1:] if name in BEYOND else PROMPTS:
            want = of_model(model, prompt)
            assert (next_token(client, prompt, ROWS) - want).abs().max() <= limit
            answer = complete(client, prompt, 32)["tokens"]
            assert answer == greedy(model, prompt, answer, 32, (0, 1, 2))


def test_the_families_that_are_tried_are_all_that_are_written() -> None:
    have = {name for name in FAMILIES if hasattr(family(name), "GGUF")}
    assert have == {changes.get("model_type", "llama") for changes, _ in WRITTEN.values()}


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_a_type_is_what_the_package_makes_of_the_weights(tmp_path, type_: str) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    file, model = written(base, tmp_path / "out", type=type_), AutoModelForCausalLM.from_pretrained(base)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    theirs, wanted = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2), gguf.GGMLQuantizationType[type_.upper()]
    for name, weight in model.state_dict().items():
        stored = tensors[theirs.get_name(name, (".weight",))]
        kind = gguf.GGMLQuantizationType.F32 if weight.dim() == 1 else wanted
        if type_ == "q4_0" and stored.name in ("token_embd.weight", "output.weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
        if type_.startswith("q") and "down_proj" in name:
            kind = gguf.GGMLQuantizationType.F16  # 112 inputs are no multiple of 32
        assert stored.tensor_type == kind
        rows = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = rows.reshape(-1, 2, 8, 64)
            rows = heads.swapaxes(1, 2).reshape(rows.shape)
        assert (gguf.quants.quantize(rows, kind).view("u1").reshape(-1) == stored.data.view("u1").reshape(-1)).all()


@pytest.mark.parametrize("type_", ["f16", "q8_0", "q4_0"])
def test_llama_cpp_reads_every_type_as_transformers_does(tmp_path, type_: str) -> None:
    base = write_bpe(make_folder(tmp_path / "base", intermediate_size=128))
    file = written(base, tmp_path / "out", type=type_)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with server(file) as client, torch.no_grad():
        want = theirs(torch.tensor([PROMPTS[1]])).logits[0, -1].log_softmax(-1)
        # llama.cpp rounds activations to eight bits where the weights are quantised
        assert (next_token(client, PROMPTS[1], ROWS) - want).abs().max() <= (2e-2 if type_ == "f16" else 0.15)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3_5_text", "qwen3_5_moe_text"])
def test_transformers_reads_the_file(tmp_path_factory, name: str) -> None:
    base, file = made(tmp_path_factory, name)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        for prompt in PROMPTS:
            want = build(base, torch.float32)(torch.tensor([prompt]))
            assert (theirs(torch.tensor([prompt])).logits - want).abs().max() <= 5e-6 * want.abs().max()


def test_a_run_is_merged_on_the_way(tmp_path, capsys) -> None:
    run = finetune(write_bpe(make_folder(tmp_path / "base")), tmp_path, *LEARN)
    loaded = load_model(str(run), precision="32-true")
    main(["convert", str(run), str(tmp_path / "out"), "--to", "gguf", "--type", "f32"])
    main(["merge", str(run), "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "merged")])
    assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "merged" / "model.gguf").read_bytes()
    assert "rounded to f32: 0.0%" in capsys.readouterr().out
    base = build(tmp_path / "base", torch.float32)
    with server(tmp_path / "out" / "model.gguf") as client:
        for prompt in PROMPTS:
            want = of_model(loaded.model, prompt)
            assert (next_token(client, prompt, ROWS) - want).abs().max() <= 1e-5
            assert (of_model(base, prompt) - want).abs().max() > 1e-2


def test_biases_that_a_method_adds_are_in_the_file(tmp_path) -> None:
    run = finetune(write_bpe(make_folder(tmp_path / "base")), tmp_path, *LEARN, method="bitfit")
    loaded = load_model(str(run), precision="32-true")
    convert(Convert(str(run), str(tmp_path / "out"), to="gguf", type="f32"))
    with server(tmp_path / "out" / "model.gguf") as client:
        assert (next_token(client, PROMPTS[0], ROWS) - of_model(loaded.model, PROMPTS[0])).abs().max() <= 1e-5


def test_a_chat_is_the_same_prompt_and_ends_where_it_ends(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [0, 2]}))
    file, tokenizer = written(base, tmp_path / "out", type="f32"), Tokenizer.load(base)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "12"}, {"role": "user", "content": "x"}]
    with server(file) as client:
        ids = ChatTemplate(tokenizer).prompt(chat)
        asked = ask(client, "/apply-template", messages=chat)["prompt"]
        assert ask(client, "/tokenize", content=asked, add_special=False)["tokens"] == ids
        for end in (0, 2):  # the tokenizer's end of text, and the template's end of a turn
            banned = [[number, False] for number in range(ROWS) if number not in (end, 33)]
            said = complete(client, ids, 4, logit_bias=[*banned, [end, 100.0]])
            assert (said["tokens"], said["stop_type"]) == ([end], "eos")


def test_a_run_on_the_alpaca_template_has_that_template(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base", eos_token_id=0))
    run = finetune(base, tmp_path, *LEARN, "--data.template", "alpaca")
    loaded = load_model(str(run))
    convert(Convert(str(run), str(tmp_path / "out"), to="gguf"))
    for chat in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}],
    ):
        with server(tmp_path / "out" / "model.gguf") as client:
            asked = ask(client, "/apply-template", messages=chat)["prompt"]
            assert ask(client, "/tokenize", content=asked, add_special=False)["tokens"] == loaded.template.prompt(chat)
    said = (tmp_path / "out" / "Modelfile").read_text()
    assert "### Instruction:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}<|endoftext|>" in said
    assert 'SYSTEM """Below is an instruction that describes a task. Write' in said


def test_a_base_without_a_template_gets_none(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    file = written(base, tmp_path / "out")
    assert "tokenizer.chat_template" not in gguf.GGUFReader(file).fields
    assert "TEMPLATE" not in (tmp_path / "out" / "Modelfile").read_text()


def test_llama_cpp_cuts_text_into_the_tokens_of_a_tokenizer_json_and_a_tokenizer_model(tmp_path) -> None:
    plain = write_bpe(make_folder(tmp_path / "base"))
    pieces = make_folder(tmp_path / "pieces", vocab_size=352, bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (pieces / name).unlink()
    (pieces / "tokenizer.model").write_bytes(sentencepiece_model())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (pieces / "tokenizer_config.json").write_text(json.dumps(names))
    for number, folder in enumerate((plain, pieces)):
        tokenizer = Tokenizer.load(folder)
        with server(written(folder, tmp_path / f"out{number}", type="f16")) as client:
            for text in (text for text in strings(40) if text[:1].strip()):  # transformers drops a first space
                got = ask(client, "/tokenize", content=text, add_special=False)["tokens"]
                assert got == tokenizer.encode(text), text
            first = ask(client, "/tokenize", content="x", add_special=True)["tokens"][0]
            assert (first == tokenizer.bos_id) == tokenizer.adds_bos == (folder is pieces)


CHATML_IN_GO = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}<|im_start|>user
{{ .Prompt }}<|im_end|>
<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
IN_GO = {
    "llama3": "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}"
    "<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Response }}<|eot_id|>",
    "llama2": "[INST] {{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}{{ .Prompt }} [/INST]"
    "{{ .Response }} </s><s>",
    "gemma": "{{ if .System }}<start_of_turn>system\n{{ .System }}<end_of_turn>\n{{ end }}<start_of_turn>user\n"
    "{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n{{ .Response }}<end_of_turn>\n",
    "zephyr": "{{ if .System }}<|system|>\n{{ .System }}</s>\n{{ end }}<|user|>\n{{ .Prompt }}</s>\n<|assistant|>\n"
    "{{ .Response }}</s>\n",
}


@pytest.mark.parametrize("style", STYLES)
def test_the_modelfile_says_the_template_in_go(tmp_path, capsys, style: str) -> None:
    base = make_folder(tmp_path / "base", vocab_size=512)
    write_folder(base, style)
    (base / "generation_config.json").unlink()
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    if STYLES[style][2]:
        starts = [(STYLES[style][2], tokenizer.token_to_id(STYLES[style][2]))]
        framed = processors.TemplateProcessing(single=f"{STYLES[style][2]} $A", special_tokens=starts)
        tokenizer.post_processor = framed if style in IN_GO else tokenizer.post_processor
        tokenizer.save(str(base / "tokenizer.json"))
    written(base, tmp_path / "out", type="f16")
    said = (tmp_path / "out" / "Modelfile").read_text()
    assert said.startswith("FROM ./model.gguf\n")
    assert ("add_bos_token is false" in capsys.readouterr().out) == (style == "zephyr")  # its template writes no BOS
    assert f'TEMPLATE """{IN_GO.get(style, CHATML_IN_GO)}"""' in said
    template = ChatTemplate(Tokenizer.load(base))
    stops = [line for line in said.splitlines() if line.startswith("PARAMETER stop ")]
    assert [json.loads(line.split(" ", 2)[2]) for line in stops] == [
        template.tokenizer.backend.names[number] for number in template.stop_ids
    ]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    with server(tmp_path / "out" / "model.gguf") as client:  # one BOS, not two
        used = client.handle_chat_completions({"messages": chat, "max_tokens": 1})["usage"]["prompt_tokens"]
        assert used == len(template.prompt(chat))


def test_the_modelfile_of_a_run_has_its_system_message(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base", eos_token_id=0))
    run = finetune(base, tmp_path, *LEARN, "--data.system", "Say a colour.")
    convert(Convert(str(run), str(tmp_path / "out"), to="gguf"))
    said = (tmp_path / "out" / "Modelfile").read_text()
    assert said == f'FROM ./model.gguf\nTEMPLATE """{CHATML_IN_GO}"""\nSYSTEM """Say a colour."""\n' + (
        'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (CASES["gpt2, untied"], "gpt2 computes with activation gelu or gelu_tanh, and this model has relu"),
        (CASES["gpt_neox, tied, no attention bias"], "gptneox computes with qkv_bias True, and this model has False"),
        (CASES["dynamic"], "rope scaling dynamic is not written as GGUF: llama.cpp has none"),
        (
            {"model_type": "qwen2", "rope_parameters": longrope(32)},
            "longrope is not written .* llama, phi3 and not for qwen2",
        ),
        (CASES["yarn, kept size"], "yarn with truncate false is not written as GGUF"),
        (CASES["olmoe"], "olmoe computes with n_kv_heads 4, and this model has 2"),
        (CASES["ministral"], "llama computes with windows and positions in other layers"),
        (
            CASES["gemma4_text"] | {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "must leave a layer with a window and one without as the last two with keys",
        ),
        (
            CASES["gemma4_text"] | {"vocab_size_per_layer_input": 330},
            "per_layer_input 330 is not vocab_size",
        ),
        (
            {"model_type": "gemma2", "final_logit_softcapping": None} | GEMMA,
            "attn_logit_softcapping and final_logit_softcapping must be numbers",
        ),
        (CASES["deepseek_v2, groups, plain queries"] | {"num_hidden_layers": 27}, "experts .*groups=1.*groups=4"),
        (CASES["deepseek_v3"] | {"q_lora_rank": None}, "takes 26 and 27 layers .*; this has 2 and no q_lora_rank"),
        (CASES["deepseek_v3"] | {"topk_group": 4}, "topk_group is n_group, with which llama.cpp stops"),
        (CASES["deepseek_v3"] | {"rope_interleave": False}, "deepseek2 computes with rope_pairs True"),
        (CASES["deepseek_v3"] | {"rms_norm_eps": 1e-5}, "deepseek2 computes with norm_eps 1e-06"),
        (CASES["deepseek_v3"] | {"rope_parameters": YARN | {"mscale": 0.7}}, "mscale that is not its mscale_all_dim"),
        (CASES["qwen3_moe"], "normed=True.*, and this model has Experts"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, monkeypatch, changes: dict, said: str) -> None:
    base = make(tmp_path / "base", monkeypatch, changes)
    with pytest.raises(ConfigError, match=said):
        written(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_number_beyond_float16_is_refused(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 7e4
    model.save_pretrained(base)
    with pytest.raises(ModelError, match=r"blocks\.1\.mlp\.up\.weight holds numbers that are too large for float16"):
        written(base, tmp_path / "out", type="f16")


def test_a_file_that_is_not_the_model_is_refused_and_not_left(tmp_path, monkeypatch) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    monkeypatch.setattr("litpeft.exchange.gguf.layout.rows_dealt_out", lambda rows, _: rows)  # as others have done
    with pytest.raises(ModelError, match="logits of the file read back, f32 are off by .* nothing was written"):
        written(base, tmp_path / "out", type="f32")
    assert not (tmp_path / "out").exists()
    written(base, tmp_path / "out", type="f32", no_verify=True)


def test_no_verify_says_what_was_not_checked(tmp_path, capsys) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    run = finetune(base, tmp_path, *LEARN)
    capsys.readouterr()
    main(["convert", str(base), str(tmp_path / "a"), "--to", "gguf", "--no_verify"])
    main(["merge", str(run), "--no_verify"])
    said = capsys.readouterr().out
    assert "not checked, as --no_verify wants it: the file's header, tokenizer and logits" in said
    assert "not checked, as --no_verify wants it: the logits of the files, and of the folded weights" in said
    assert "differs by" not in said
    main(["merge", str(run), "--overwrite"])
    assert "files read back, float32" in capsys.readouterr().out


def test_an_export_is_replaced_with_overwrite(tmp_path) -> None:
    base = write_bpe(make_folder(tmp_path / "base"))
    first = written(base, tmp_path / "out", type="f16").stat().st_size
    with pytest.raises(ConfigError, match="the output exists"):
        written(base, tmp_path / "out", type="f32")
    assert written(base, tmp_path / "out", type="f32", overwrite=True).stat().st_size > 1.7 * first
    shutil.rmtree(tmp_path / "out")


def test_settings_that_do_not_go_together_are_refused(tiny_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="type is not for a Hugging Face folder"):
        Convert(str(tiny_folder), str(tmp_path / "out"), type="q8_0")
    run = finetune(tiny_folder, tmp_path, "--train.max_steps", "1")
    with pytest.raises(ConfigError, match="type: q8_0 is a type of GGUF files"):
        merge(Merge(str(run), type="q8_0"))
