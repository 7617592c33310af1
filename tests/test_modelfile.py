"""The TEMPLATE of a Modelfile, rendered by Go's text/template as Ollama does it, is the tokenizer's chat template."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
from chat_samples import STYLES, write_folder
from tokenizers import processors
from transformers import AutoTokenizer

from litpeft.data.templates import ChatTemplate
from litpeft.data.tokenizer import Tokenizer
from litpeft.exchange.modelfile import turn_of, write_modelfile

# Ollama executes a template without .Messages once for each question with its answer, a system message in the first,
# and for the last question only what stands before .Response.
PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type chat struct {
	Template string
	Messages []struct{ Role, Content string }
}

func main() {
	var chats []chat
	if err := json.NewDecoder(os.Stdin).Decode(&chats); err != nil {
		panic(err)
	}
	results := []string{}
	for _, one := range chats {
		var out strings.Builder
		whole := template.Must(template.New("").Parse(one.Template))
		start := template.Must(template.New("").Parse(strings.SplitN(one.Template, "{{ .Response }}", 2)[0]))
		turn := map[string]string{"System": "", "Prompt": "", "Response": ""}
		for _, message := range one.Messages {
			switch message.Role {
			case "system":
				turn["System"] = message.Content
			case "user":
				turn["Prompt"] = message.Content
			case "assistant":
				turn["Response"] = message.Content
				if err := whole.Execute(&out, turn); err != nil {
					panic(err)
				}
				turn = map[string]string{"System": "", "Prompt": "", "Response": ""}
			}
		}
		if err := start.Execute(&out, turn); err != nil {
			panic(err)
		}
		results = append(results, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(results)
}
"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM = (  # the system message is a part of the first question
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] + '\\n\\n' %}{% elif m['role'] == 'user' %}"
    "[INST] {{ ns.system }}{{ m['content'] }}[/INST]{% set ns.system = '' %}"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\\n{{ m['content'] }}<|end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\\n{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% else %}A chat between a curious user and "
    "an assistant. {% endif %}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ENDS = ["<s>", "</s>"]
ALL = STYLES | {
    "mistral": (MISTRAL, ENDS, "<s>", "</s>", ""),
    "mistral with a system message": (MISTRAL_SYSTEM, ENDS, "<s>", "</s>", ""),
    "phi": (PHI, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], None, "<|endoftext|>", ""),
    "vicuna": (VICUNA, ENDS, "<s>", "</s>", ""),
}
WITHOUT_SYSTEM = ("mistral",)
GO = shutil.which("go")


def chats_of(style: str) -> list[list[dict[str, str]]]:
    exchange = [("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "a b\nc"), ("assistant", "d"), ("user", "e")]
    plain = [[{"role": role, "content": text} for role, text in exchange[:count]] for count in (1, 3, 5)]
    system = {"role": "system", "content": "Be brief: {{ no code }}."}
    return plain + ([] if style in WITHOUT_SYSTEM else [[system, *chat] for chat in plain])


def in_go(template: str, chats: list[list[dict[str, str]]]) -> list[str]:
    """Returns what the actions that such a template may have make of chats: fields, and `if .System` to `end`."""
    results = []
    for chat in chats:
        said, turn = "", {"System": "", "Prompt": "", "Response": ""}
        for message in [*chat, {"role": "end"}]:
            if message["role"] in ("assistant", "end"):
                text = template if message["role"] == "assistant" else template.partition("{{ .Response }}")[0]
                turn["Response"] = message.get("content", "")
                text = re.sub(r"(?s)\{\{ if \.System \}\}(.*?)\{\{ end \}\}", r"\1" if turn["System"] else "", text)
                said += re.sub(r"\{\{ \.(\w+) \}\}", lambda found, turn=turn: turn[found[1]], text)
                turn = {"System": "", "Prompt": "", "Response": ""}
            else:
                turn["System" if message["role"] == "system" else "Prompt"] = message["content"]
        results.append(said)
    return results


def run_go(folder: Path, chats: list[tuple[str, list[dict[str, str]]]]) -> list[str]:
    """Returns what Go makes of templates with their chats."""
    (folder / "main.go").write_text(PROGRAM)
    asked = json.dumps([{"Template": template, "Messages": chat} for template, chat in chats])
    done = subprocess.run([GO, "run", "main.go"], input=asked, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def template_of(folder: Path, style: str, monkeypatch) -> tuple[str, str, list[str]]:
    """Returns TEMPLATE and SYSTEM of a style's Modelfile, and what transformers makes of the chats."""
    monkeypatch.setitem(STYLES, style, ALL[style])
    write_folder(folder, style)
    if ALL[style][0].startswith("{{ bos_token }}") or style in ("llama3", "gemma"):  # a tokenizer that adds it, too
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos = ALL[style][2]
        framed = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = framed
        tokenizer.save(str(folder / "tokenizer.json"))
    template = ChatTemplate(Tokenizer.load(folder), is_setting=False)
    write_modelfile(folder, "model.gguf", template, None)
    said = (folder / "Modelfile").read_text()
    [go] = re.findall(r'(?s)TEMPLATE """(.*?)"""', said)
    system = re.findall(r'(?s)SYSTEM """(.*?)"""', said)
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats_of(style)]
    lead = turn_of(template).lead  # which the model writes, and Ollama keeps in the answer
    bos = ALL[style][2] if template.tokenizer.adds_bos else None
    texts = [text.removeprefix(bos or "") for text in texts]
    return go, "".join(system), [text.replace(f"{lead}4", "4").replace(f"{lead}d", "d") for text in texts]


def as_ollama(chats: list[list[dict[str, str]]], system: str) -> list[list[dict[str, str]]]:
    """Returns the chats with the Modelfile's SYSTEM where they have none."""
    first = [{"role": "system", "content": system}] if system else []
    return [chat if chat[0]["role"] == "system" else first + chat for chat in chats]


@pytest.mark.parametrize("style", ALL)
def test_the_template_says_what_the_tokenizers_says(tmp_path, monkeypatch, style: str) -> None:
    go, system, want = template_of(tmp_path, style, monkeypatch)
    assert in_go(go, as_ollama(chats_of(style), system)) == want


@pytest.mark.slow
@pytest.mark.skipif(GO is None, reason="there is no Go: `apt-get install golang-go`")
def test_go_renders_the_templates_as_the_tokenizers_do(tmp_path, monkeypatch) -> None:
    asked, wanted = [], []
    for style in ALL:
        go, system, want = template_of(tmp_path / style, style, monkeypatch)
        asked += [(go, chat) for chat in as_ollama(chats_of(style), system)]
        wanted += want
    assert run_go(tmp_path, asked) == wanted
    assert len(wanted) == 6 * len(ALL) - 3 * len(WITHOUT_SYSTEM)
