"""Fabric is imported alone, and the rest of Lightning is there for those who ask for it."""

import subprocess
import sys

import pytest

ALONE = """
import sys
import litpeft.train.finetune
assert not {"lightning", "torch._dynamo", "torch.distributed.fsdp", "sympy"} & sys.modules.keys()
from litpeft.train.fabric import Fabric
loaded = [name for name in ("lightning.pytorch", "torchmetrics", "scipy", "matplotlib") if name in sys.modules]
assert not loaded, loaded
"""


AFTERWARDS = [
    "import lightning; assert lightning.Fabric is Fabric is lightning.fabric.Fabric; lightning.Trainer",
    "from lightning import Trainer, fabric; import torchmetrics; assert fabric.Fabric is Fabric",
    "import lightning.pytorch; assert lightning.pytorch.Trainer is lightning.Trainer",
    "import lightning; assert not hasattr(lightning, '__wrapped__'); assert 'torchmetrics' not in sys.modules",
    "Fabric(accelerator='cpu', devices=1).launch(); assert 'lightning.pytorch' not in sys.modules",
]
EACH = """
import multiprocessing
import torch._dynamo, torch.distributed.fsdp  # what Lightning imports as well: once, not in each copy
for code in sys.argv[1:]:
    process = multiprocessing.get_context("fork").Process(target=exec, args=(code, globals()))
    process.start()
    process.join()
    print(process.exitcode)
"""


@pytest.fixture(scope="module")
def ended() -> tuple[dict[str, str], str]:
    """Runs a process that imports Fabric alone, and each code in a copy of it; returns their exit codes, and errors."""
    done = subprocess.run([sys.executable, "-c", ALONE + EACH, *AFTERWARDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(AFTERWARDS, done.stdout.split(), strict=True)), done.stderr


@pytest.mark.parametrize("afterwards", AFTERWARDS)
def test_fabric_alone_and_all_of_lightning_later(afterwards: str, ended: tuple[dict[str, str], str]) -> None:
    codes, said = ended
    assert codes[afterwards] == "0", said


def test_lightning_that_is_imported_first_is_used_as_it_is() -> None:
    code = "import lightning; import litpeft.train.fabric as ours; assert ours.Fabric is lightning.Fabric"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
