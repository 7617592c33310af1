"""What the tests of `litpeft download` share: a tiny model, the command in a process of its own, and what it left."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save

from litpeft.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENTRY = """
import sys
sys.path.remove("")  # the installed command does not look for modules in the working directory
from litpeft.cli import main
assert "torch" not in sys.modules and "huggingface_hub" not in sys.modules
try:
    main(["download", *sys.argv[1:]])
finally:
    assert "torch" not in sys.modules
"""


def weights(seed: int, size: int = 1000) -> bytes:
    return save({f"w{seed}": numpy.random.default_rng(seed).standard_normal(size, dtype=numpy.float32)})


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"w1": SHARDS[0], "w2": SHARDS[1]}}).encode()
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": INDEX,
    SHARDS[0]: weights(1),
    SHARDS[1]: weights(2),
}


def run(
    folder: Path, source: str, out: str = "", revision: str = "", dry_run: bool = False, weights: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs `litpeft download` in `folder`, away from the user's own settings; `env` adds to the environment."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PIP_"))}
    keep |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf_home"), "NO_PROXY": "127.0.0.1", "PIP_NO_INDEX": "1"}
    keep |= {"PIP_CONFIG_FILE": os.devnull}
    given = ("--out", out), ("--revision", revision), ("--weights", weights)
    options = [word for key, value in given if value for word in (key, value)]
    command = [sys.executable, "-c", ENTRY, source, *options, *(["--dry_run"] if dry_run else [])]
    return subprocess.run(command, cwd=folder, env=keep | env, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess[str], kind: type[UserError], what: str, *words: str) -> None:
    """Asserts one clear error of that kind, with these words, a hint and no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == kind.exit_code, done.stderr
    assert lines[-2].startswith("litpeft: error: "), done.stderr
    assert lines[-1].startswith("hint: ")
    assert "Traceback" not in done.stderr
    for word in (what, *words):
        assert word in "\n".join(lines[-2:])


def content(folder: Path) -> dict[str, bytes]:
    """Returns the visible files of a folder, but for the checksums that are kept beside them."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files.pop("checksums.json", None)
    return files


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Gives a file system of 1 MiB at `folder`; skips the test where that needs rights which the user lacks."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
