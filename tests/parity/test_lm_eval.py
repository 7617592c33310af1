"""`litpeft evaluate --tasks` beside lm-evaluation-harness with transformers' model: each request, and the metrics."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COLOURS, finetune

from litpeft.cli import main
from litpeft.core.errors import ConfigError, DataError, ResourceError
from litpeft.generate.evaluate import evaluate
from litpeft.generate.settings import Evaluate

pytest.importorskip("lm_eval", reason="lm_eval is installed by `bash scripts/test.sh --parity`")

HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl, train: {folder}/train.jsonl}}}}
test_split: test
training_split: train
fewshot_split: train
"""
ASKED = 'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
TASKS = {
    "choice": ASKED + "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "letters": ASKED + "output_type: multiple_choice\ndoc_to_choice: [A, B, C]\ndoc_to_target: letter\n",
    "generated": ASKED
    + 'output_type: generate_until\ndoc_to_target: " {{answer}}"\nmetric_list: [{metric: exact_match}]\n'
    'generation_kwargs: {until: ["e", "q"], max_gen_toks: 24, do_sample: false}\n',
    "text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "last": 'output_type: loglikelihood\ndoc_to_text: "It is "\ndoc_to_target: "{{answer}}"\n'
    "metric_list: [{metric: acc}, {metric: perplexity}]\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with tasks; some of their documents are longer than the tiny model reads."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    choices = sorted(COLOURS.values())
    rows = [
        {
            "question": f"{'Think. ' * (90 * (i == 2))}What is the colour of {thing}?",
            "choices": choices,
            "gold": choices.index(colour),
            "letter": i % 3,
            "answer": colour,
            "text": f"The colour of {thing} is {colour}. " * (1 + 9 * i),
        }
        for i, (thing, colour) in enumerate(COLOURS.items())
    ]
    for name, part in (("rows", rows), ("train", rows[4:])):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, text in TASKS.items():
        head = HEAD.format(name=f"tiny_{name}", folder=tmp_path / "tasks")
        (tmp_path / "tasks" / f"{name}.yaml").write_text(head + text)
    return tmp_path / "tasks"


def theirs(model: Path, folder: Path, shots: int | None, as_chat: bool) -> dict[str, Any]:
    """Returns the results of the harness with its own backend for transformers' models."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        HFLM(pretrained=str(model), dtype="float32", batch_size=4, device="cpu"),
        tasks=[f"tiny_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=shots,
        apply_chat_template=as_chat,
        fewshot_as_multiturn=as_chat,
        bootstrap_iters=1000,
    )


@pytest.mark.parametrize(("shots", "as_chat"), [(None, False), (2, False), (1, True)])
def test_every_request_gets_the_answer_of_transformers_model(tiny_folder, folder, tmp_path, shots, as_chat, capsys):
    torch.set_num_threads(1)
    want = theirs(tiny_folder, folder, shots, as_chat)
    capsys.readouterr()
    common = {"tasks": ("tiny_*",), "task_folder": str(folder), "precision": "32-true", "shots": shots}
    for suffix in ("json", "jsonl"):
        evaluate(Evaluate(str(tiny_folder), as_chat=as_chat, output=str(tmp_path / f"out.{suffix}"), **common))
    got = json.loads((tmp_path / "out.json").read_text())["model"]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert got["n-shot"] == want["n-shot"] == {f"tiny_{name}": shots or 0 for name in TASKS}
    for name in want["results"]:
        mine = sorted((row for row in rows if row["task"] == name), key=lambda row: row["doc_id"])
        samples = sorted(want["samples"][name], key=lambda sample: sample["doc_id"])
        assert [row["arguments"] for row in mine] == json.loads(json.dumps([s["arguments"] for s in samples]))
        for row, sample in zip(mine, samples, strict=True):
            pairs = zip(row["model"]["resps"], sample["resps"], strict=True)
            for (mine_said,), (said,) in pairs:
                assert mine_said == (said if isinstance(said, str) else pytest.approx(said, abs=2e-4, rel=1e-6)), name
        figures = {key: value for key, value in want["results"][name].items() if not isinstance(value, str)}
        found = {key: value for key, value in got["results"][name].items() if not isinstance(value, str)}
        assert found == pytest.approx(figures, rel=1e-4), name
    assert any(row["task"] == "tiny_generated" and row["model"]["resps"][0][0] for row in rows)


def test_a_run_stands_beside_its_base_and_nothing_else_is_printed(tiny_folder, folder, tmp_path, capfd) -> None:
    learn = "--train.epochs", "60", "--train.lr", "1e-2", "--validation.interval", "1000"
    run = finetune(tiny_folder, tmp_path, *learn, "--method.unfreeze", '["head.weight", "embed.weight"]')
    both = finetune(tiny_folder, tmp_path, "--train.max_steps", "1", out="other", method="prefix")
    capfd.readouterr()
    out = tmp_path / "out.json"
    more = ["--task_folder", str(folder), "--precision", "32-true", "--also", str(both), "--output", str(out)]
    main(["evaluate", str(run), "--tasks", f"tiny_choice,{folder / 'text.yaml'}", "--max_rows", "4", *more])
    said = capfd.readouterr()
    assert re.match(r" +base +run +other\ntiny_choice, 4 documents, 0 shots\n +acc ", said.out)
    told = r"(reading the task \S+|(base|run|other): 2 tasks|[\d,]+ of [\d,]+ (continuations|pieces of texts) scored)"
    assert all(re.fullmatch(told, line) for line in said.err.splitlines()), said.err
    found = json.loads(out.read_text())
    assert list(found) == ["base", "run", "other"]
    evaluate(
        Evaluate(str(tiny_folder), tasks=("tiny_choice",), task_folder=str(folder), precision="32-true", max_rows=4)
    )
    alone = re.search(r"acc +(\S+)", capfd.readouterr().out)[1]
    assert f"{found['base']['results']['tiny_choice']['acc,none']:.4f}" == alone
    figures = [one["results"]["tiny_text"]["bits_per_byte,none"] for one in found.values()]
    assert len(set(figures)) == 3


def test_what_cannot_be_measured_is_said_in_one_line(tiny_folder, folder, monkeypatch) -> None:
    monkeypatch.setattr("litpeft.generate.harness.load_measured", lambda settings: pytest.fail("too late"))
    kinds = {"bad_kind": "output_type: other\n", "bad_code": "unsafe_code: true\n", "bad_file": ""}
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, folder=folder) + text + TASKS["last"][:0])
    (folder / "bad_file.yaml").write_text(HEAD.format(name="bad_file", folder="/none") + TASKS["last"])
    (folder / "bad_net.yaml").write_text(
        f"task: bad_net\ndataset_path: nobody/nothing\ntest_split: test\n{TASKS['last']}"
    )

    def asked(name: str) -> Evaluate:
        return Evaluate(str(tiny_folder), tasks=(name,), task_folder=str(folder))

    with pytest.raises(ConfigError, match='there is no task "tiny_choise" .did you mean "tiny_choice"'):
        evaluate(asked("tiny_choise"))
    with pytest.raises(ConfigError, match='"bad_code" runs code that the model writes'):
        evaluate(asked("bad_code"))
    with pytest.raises(DataError, match='the task "bad_file" cannot be read'):
        evaluate(asked("bad_file"))
    with pytest.raises(ResourceError, match='the data set of the task "bad_net" cannot be fetched'):
        evaluate(asked("bad_net"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
