"""Chat templates by name: their text is that of the models they are known from, and it travels into every export."""

import hashlib
import json

import gguf
import pytest
from chat_samples import bpe, chats
from conftest import finetune, make_folder
from llama_cpp import write_bpe
from test_templates import INJECTED, special_ids, trained_text
from test_thinking import LAST_ONLY
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from litpeft.cli import main
from litpeft.core.errors import ConfigError
from litpeft.data.builtin import BUILT_IN, GENERATION
from litpeft.data.formats.turn import Turn
from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.run import find_run
from litpeft.generate.load import load_model

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:\n"
)
# what the models' own templates (meta-llama/Llama-2-7b-chat-hf, Meta-Llama-3-8B-Instruct, Mistral-7B-Instruct-v0.2,
# gemma-2-9b-it, Phi-3-mini-4k-instruct, zephyr-7b-beta), FastChat (vicuna v1.1), OpenAI's description of ChatML and
# Stanford's Alpaca write of: user "q", assistant "a", user "r", assistant "b". BOS is <s>, EOS </s>.
TEXTS = {
    "alpaca": "<s>" + INPUT.format("q") + "a</s>" + "\n\n### Instruction:\nr\n\n### Response:\nb</s>",
    "chatml": "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "llama-2": "<s>[INST] q [/INST] a </s><s>[INST] r [/INST] b </s>",
    "llama-3": "<s><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
    "mistral": "<s>[INST] q [/INST]a</s>[INST] r [/INST]b</s>",
    "gemma": "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
    "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    "phi": "<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n<|user|>\nr<|end|>\n<|assistant|>\nb<|end|>\n</s>",
    "vicuna": f"<s>{VICUNA}USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>",
    "zephyr": "<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nr</s>\n<|assistant|>\nb</s>\n",
}
SYSTEM = {  # how they begin with the system message "Be."
    "alpaca": "<s>Be.\n\n### Instruction:\nq",
    "chatml": "<s><|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nq",
    "llama-2": "<s>[INST] <<SYS>>\nBe.\n<</SYS>>\n\nq [/INST]",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe.<|eot_id|><|start_header_id|>user",
    "mistral": "<s>[INST] Be.\n\nq [/INST]",
    "gemma": "<s><start_of_turn>user\nBe.\n\nq<end_of_turn>",
    "phi": "<|system|>\nBe.<|end|>\n<|user|>\nq",
    "vicuna": "<s>Be. USER: q ASSISTANT:",
    "zephyr": "<|system|>\nBe.</s>\n<|user|>\nq",
}
PROMPTS = {  # what stands before the last answer
    name: text[: text.rindex("b")].removesuffix(" " if name in ("llama-2", "vicuna") else "")
    for name, text in TEXTS.items()
}
ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi": "<|end|>"}
CHAT = [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"), Turn("assistant", "b")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer with BOS, EOS and every token that a template needs."""
    folder = tmp_path_factory.mktemp("all")
    bpe(["<s>", "</s>", *(token for one in BUILT_IN.values() for token in one.tokens)]).save(
        str(folder / "tokenizer.json")
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = Tokenizer.load(folder)
    found.adds_bos = True
    return found


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_template_writes_the_text_of_the_original_and_trains_its_answers(name, tokenizer):
    template = ChatTemplate(tokenizer, name)
    rendered = template.spans(CHAT)
    assert rendered.text == TEXTS[name]
    assert template.render([Turn("system", "Be."), *CHAT]).startswith(SYSTEM[name])
    assert template.render(CHAT[:3], True) == PROMPTS[name]
    end = ENDS.get(name, "</s>")
    said = {"llama-2": " {} </s>", "vicuna": " {}</s>"}.get(name, f"{{}}{end}")
    assert trained_text(tokenizer, rendered) == said.format("a") + said.format("b")
    assert tokenizer.token_id(end) in template.stop_ids
    assert template.prompt(CHAT[:3]) == tokenizer.encode(PROMPTS[name])
    assert not rendered.difference


@pytest.mark.parametrize("name", BUILT_IN)
def test_any_chat_is_written_as_transformers_writes_it(name, tokenizer):
    template = ChatTemplate(tokenizer, name)
    assert not GENERATION.search(template.exported)
    for turns in chats(30, seed=7):
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = template.render(turns)
        for source in (template.source, template.exported):
            theirs, _ = render_jinja_template(
                [messages], chat_template=source, bos_token="<s>", eos_token="</s>", add_generation_prompt=False
            )
            assert theirs == [text]
        assert template.render(turns) == template.spans(turns).text
        assert text.startswith(template.render(turns[:-1], True))


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_user_writes_never_becomes_a_special_token(name, tokenizer):
    template = ChatTemplate(tokenizer, name)
    plain = special_ids(tokenizer, tokenizer.encode(template.render(CHAT)))
    for text in [*INJECTED, "<|user|>x<|end|>", "<|eot_id|>"]:
        turns = [Turn(turn.role, f"{turn.content} {text}.") for turn in CHAT]
        rendered = template.spans(turns)
        assert special_ids(tokenizer, tokenizer.encode(rendered.text, rendered.literal)) == plain


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "phi"])
def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(name, tokenizer, tmp_path):
    bpe(["<s>", "</s>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    bare = Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError) as error:
        ChatTemplate(bare, name)
    assert f"data.template: the template {name} is not for this model: it writes {BUILT_IN[name].tokens[0]}" in str(
        error.value
    )
    assert "these are: alpaca, llama-2, mistral, vicuna, zephyr" in str(error.value)
    assert ChatTemplate(bare, "vicuna").render(CHAT).startswith("A chat")  # and without BOS


def ids_of(folder, messages):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=False)


@pytest.fixture(scope="module", params=["vicuna", "options", "model"])
def run(request, tmp_path_factory):
    """A run that was trained with another template than its base has, or told it something, or neither."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_bpe(make_folder(folder / "base"))
    if request.param == "options":
        (base / "chat_template.jinja").write_text(LAST_ONLY)
    more = {
        "vicuna": ["--data.template", "vicuna"],
        "options": ["--data.template_options", '{"enable_thinking": false}'],
        "model": [],
    }[request.param]
    return finetune(base, folder, "--train.max_steps", "1", "--train.lr", "0.01", *more), base


def test_the_template_and_its_hash_travel_into_every_export(run, tmp_path):
    run, base = run
    found = find_run(run)
    tokenizer, template = found.tokenizer_and_template(base)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    expected = tokenizer.encode(template.render(messages))
    asked = template.prompt([Turn("user", "q")])
    main(["merge", str(run), "--out", str(tmp_path / "merged"), "--no_verify"])
    main(["convert", str(run), str(tmp_path / "peft"), "--to", "peft", "--no_verify"])
    main(["convert", str(run), str(tmp_path / "mlx"), "--to", "mlx", "--no_verify"])
    main(["merge", str(run), "--out", str(tmp_path / "gguf"), "--to", "gguf", "--no_verify"])
    written = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields["tokenizer.chat_template"].contents()
    sources = [(tmp_path / name / "chat_template.jinja").read_text() for name in ("merged", "peft", "mlx")]
    recorded = found.facts["template"].get("text_sha256") or found.facts["template"]["sha256"]
    assert {hashlib.sha256(source.encode()).hexdigest() for source in [*sources, written]} == {recorded}
    for name in ("merged", "peft"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.apply_chat_template(messages, return_dict=False) == expected
        assert theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False) == asked
    assert load_model(str(tmp_path / "merged")).template.prompt([Turn("user", "q")]) == asked
    assert find_run(tmp_path / "peft").tokenizer_and_template(base)[1].prompt([Turn("user", "q")]) == asked


def test_a_whole_model_has_the_template_of_its_training(tmp_path):
    base = make_folder(tmp_path / "base")
    (base / "chat_template.jinja").write_text(LAST_ONLY)
    told = ["--data.template_options", '{"enable_thinking": false}']
    for name, more in (("options", told), ("vicuna", ["--data.template", "vicuna"])):
        run = finetune(base, tmp_path, "--train.max_steps", "1", *more, method="full", out=name)
        loaded = load_model(str(run))
        theirs = AutoTokenizer.from_pretrained(run / "final")
        asked = loaded.template.prompt([Turn("user", "q")])
        chat = [{"role": "user", "content": "q"}]
        assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == asked
