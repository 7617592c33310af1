"""Makes an archive of this folder: tiny runs of an older version of litpeft, with what that version says of them.

    git worktree add /tmp/older 204c3a8                      # format 2; f913304 is format 3
    PYTHONPATH=/tmp/older python tests/old_runs/make.py tests/old_runs/format2.tar.gz

An archive holds base/, data/, and for each method of METHODS a run of 400 steps with its checkpoint of step 398,
answers.jsonl (greedy, eight tokens), and logits.safetensors: the logits (1, T, vocabulary) of IDS in float32.
"""

import shutil
import sys
import tarfile
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file

METHODS = {
    "lora": ["--method.rank", "4", "--method.unfreeze", '["*norm*"]'],
    "adapter_v2": ["--method.prompt_length", "2"],
    "full": ["--method.unfreeze", '["*norm*", "*.mlp.*"]'],
}
TRAINING = {
    "train.max_steps": 400,
    "train.epochs": 999,
    "train.batch_size": 6,
    "train.lr": 5e-2,
    "train.warmup_steps": 0,
    "train.schedule": "constant",
    "base.precision": "32-true",
    "validation.sample_tokens": 4,
    "validation.interval": 999,
    "checkpoint.interval": 398,
    "checkpoint.keep_last": 9,
}
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
IDS = torch.randint(0, 258, (1, 6), generator=torch.Generator().manual_seed(7))


def make(folder: Path) -> None:
    """Writes what an archive holds into a new folder."""
    from conftest import make_folder, write_rows

    from litpeft.cli import main

    base = make_folder(folder / "base", initializer_range=0.2, dtype="bfloat16", **SHAPE)
    data = write_rows(folder)
    for method, words in METHODS.items():
        run = folder / method
        pairs = TRAINING | {"base.dir": base, "data.path": data, "out": run}
        main(["finetune", method, *(f"--{key}={value}" for key, value in pairs.items()), *words])
        files = ["--input", str(data / "validation.jsonl"), "--output", str(run / "answers.jsonl")]
        main(["generate", str(run), *files, "--precision", "32-true", "--sampling.max_new_tokens", "8"])
        with torch.no_grad():
            logits = import_module("litpeft.build").load(str(run), precision="32-true").model(IDS)
        save_file({"logits": logits.contiguous()}, run / "logits.safetensors")
        shutil.rmtree(run / "checkpoints" / "step-00000400")
        (run / "loss.png").unlink()


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent.parent))  # for conftest
    place = Path("/tmp/old_runs")  # its path is written into the runs
    make(place)
    with tarfile.open(sys.argv[1], "w:gz") as archive:
        for path in sorted(place.iterdir()):
            archive.add(path, path.name, filter=lambda info: info.replace(uid=0, gid=0, uname="", gname="", deep=False))
    shutil.rmtree(place)
