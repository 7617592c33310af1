"""What a run tells: metrics.csv reads back exactly and survives a kill, the terminal shows the same figures."""

import csv
import os
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import read_metrics

from litpeft.core.errors import ConfigError, ModelError
from litpeft.train.log import COLUMNS, Log, duration, time_left

OF_A_STEP = [column for column in COLUMNS if not column.startswith("val_")]


def record(step: int, loss: float = 1.0) -> dict[str, float]:
    values = step, step / 10, loss, 2e-4, 0.5, 100 * step, 40 * step, 50.0, 2.0 * step
    return dict(zip(OF_A_STEP, values, strict=True))


def run_python(code: str, *args: object, **options: object) -> subprocess.Popen:
    """Starts `code` in a process of its own, with this file's `record` at hand."""
    head = "import sys\nfrom pathlib import Path\nfrom test_log import Log, record\n"
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=env, **options)


def test_numbers_read_back_exactly(tmp_path):
    rng = random.Random(0)
    values = [rng.uniform(-1, 1) * 10 ** rng.randint(-300, 300) for _ in range(200)] + [0.1, 5e-324]
    with Log(tmp_path, len(values)) as log:
        for step, value in enumerate(values, start=1):
            log.step(**dict.fromkeys(OF_A_STEP, value) | {"step": step, "tokens": step, "trained_tokens": step})
    with open(tmp_path / "metrics.csv", newline="") as file:
        independent = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in independent] == values
    rows = read_metrics(tmp_path)
    assert [row["grad_norm"] for row in rows] == values
    assert [row["step"] for row in rows] == list(range(1, len(values) + 1))


def test_a_validation_has_a_row_of_its_own(tmp_path):
    with Log(tmp_path, 1) as log:
        log.validation(0, 2.5, 300)
        log.step(**record(1))
    empty = dict.fromkeys(COLUMNS)
    first, second = read_metrics(tmp_path)
    assert first == empty | {"step": 0.0, "val_loss": 2.5}
    assert second["val_loss"] is None
    assert second["loss"] == 1.0


def test_rows_survive_a_kill(tmp_path):
    code = """
        with Log(Path(sys.argv[1]), 100) as log:
            for step in range(1, 8):
                log.step(**record(step))
            print("ready", flush=True)
            sys.stdin.read()
    """
    child = run_python(code, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 8))


def test_a_resumed_run_cuts_later_rows_and_a_torn_one(tmp_path):
    with Log(tmp_path, 10) as log:
        for step in range(1, 8):
            log.step(**record(step, loss=0.1 * step))
        log.validation(5, 2.0, 10)
    whole = (tmp_path / "metrics.csv").read_text()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("8,0.8,0.7")  # a kill in the middle of a row
    with Log(tmp_path, 10, start_step=5) as log:
        log.step(**record(6, loss=0.6 + 1e-16))
    kept = [line for line in whole.splitlines() if not line.startswith(("6,", "7,"))]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[:-1] == kept
    assert float(lines[-1].split(",")[2]) == 0.6 + 1e-16


def test_a_new_run_begins_a_new_file(tmp_path):
    for _ in range(2):
        with Log(tmp_path, 3) as log:
            log.validation(0, 2.0, 10)
            log.step(**record(1))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_disabled_log_does_nothing(tmp_path, capfd):
    with Log(tmp_path / "run", 3, tensorboard=True, enabled=False) as log:
        log.step(**record(1))
        log.validation(1, 2.0, 10)
        log.message("hello")
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("steps", "most"), [(1, 1), (3, 3), (20, 21), (37, 22), (1000, 22), (12345, 22)])
def test_plain_lines_are_about_twenty_with_the_first_and_the_last(tmp_path, capfd, steps, most):
    with Log(tmp_path, steps) as log:
        for step in range(1, steps + 1):
            log.step(**record(step))
    out, err = capfd.readouterr()
    shown = [int(line.removeprefix("step ").split("/")[0]) for line in err.splitlines()]
    assert out == ""
    assert shown == sorted(set(shown))
    assert (shown[0], shown[-1]) == (1, steps)
    assert min(steps, 10) <= len(shown) <= most


def test_a_run_that_time_ends_has_its_lines_too(tmp_path, capfd):
    with Log(tmp_path, 100_000, max_time=600.0) as log:
        for step in range(1, 298):  # 2 s each, then stopped by hand
            log.step(**record(step))
    lines = capfd.readouterr().err.splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[-1].startswith("step 297/100000  loss 1.0000  lr 2.00e-04  50 tokens/s")
    assert lines[-1].endswith("6.0 s left")


def test_time_left_is_the_nearer_of_steps_and_max_time():
    pace = [(10, 100.0), (15, 110.0), (20, 140.0)]  # 4 s a step
    assert time_left(pace, 50, None) == 30 * 4
    assert time_left(pace, 50, 200.0) == 60
    assert time_left(pace, 50, 1000.0) == 30 * 4
    assert time_left(pace[:1], 50, None) is None
    assert time_left(pace[:1], 50, 130.0) == 30
    assert time_left(pace, 20, 100.0) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (8.34, "8.3 s"), (59.96, "1 min"), (112, "1 min 52 s"), (119.7, "2 min"), (3599.7, "1 h")]
    + [(7500, "2 h 5 min"), (86399, "1 d"), (97200, "1 d 3 h"), (864e6, "10,000 d")],
)
def test_a_duration_reads_as_a_person_says_it(seconds, text):
    assert duration(seconds) == text


def test_a_terminal_has_a_bar_with_the_figures_and_messages_above_it(tmp_path):
    code = """
        with Log(Path(sys.argv[1]), 40) as log:
            log.step(**record(1))
            log.message("[bold]42 rows[/bold] \\x1b]0;title\\x07")
            log.step(**record(2))
    """
    master, slave = pty.openpty()
    with run_python(code, tmp_path, stdout=subprocess.PIPE, stderr=slave) as child:
        os.close(slave)
        shown = b""
        while part := read_terminal(master):
            shown += part
        assert child.stdout.read() == b""
    os.close(master)
    assert child.returncode == 0
    text = shown.decode()
    assert "[bold]42 rows[/bold] \ufffd]0;title\ufffd" in text
    for figure in ("step 2/40", "loss 1.0000", "lr 2.00e-04", "50 tokens/s", "1 min 16 s left"):
        assert figure in text


def read_terminal(master: int) -> bytes:
    """Returns what the other end wrote; empty at its end, which Linux reports as an error."""
    try:
        return os.read(master, 65536)
    except OSError:
        return b""


def test_tensorboard_holds_the_same_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with Log(tmp_path, 2, tensorboard=True) as log:
        log.validation(0, 2.5, 10)
        log.step(**record(1, loss=1.25))
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, seen = file.read_bytes(), {}
    while data:  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data)
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert seen[("val_loss", 0)] == 2.5
    assert seen[("loss", 1)] == 1.25
    assert {tag for tag, _ in seen} == {"loss", "val_loss", "lr", "grad_norm", "tokens_per_second"}


def test_missing_tensorboard_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    what = "TensorBoard files need a package that is not installed"
    with pytest.raises(ConfigError, match=what) as caught, Log(tmp_path, 2, tensorboard=True):
        pass
    assert caught.value.hint == "pip install tensorboardX"


def test_a_file_that_is_not_metrics_is_refused_and_kept(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("city,people\nBerlin,3\n")
    with pytest.raises(ModelError, match="city,people.* not the header of litpeft's metrics"), Log(tmp_path, 2):
        pass
    assert path.read_text() == "city,people\nBerlin,3\n"


def test_a_file_of_an_earlier_version_gets_the_columns_that_it_lacks(tmp_path):
    with Log(tmp_path, 2) as log:
        log.step(**record(1))
    path = tmp_path / "metrics.csv"
    now = path.read_text()
    path.write_text("".join(line.rsplit(",", 2)[0] + "\n" for line in now.splitlines()))
    assert "val_preferred" not in path.read_text()
    with Log(tmp_path, 2, start_step=1):
        pass
    assert path.read_text() == now


@pytest.mark.parametrize("bad", ["3,x,,,,,,,,,,", "3,1", ",,1.0,,,,,,,,,", "3" + "," * 20])
def test_a_damaged_row_is_named(tmp_path, bad):
    with Log(tmp_path, 2) as log:
        log.step(**record(1))
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(bad + "\n")
    named = f'"{re.escape(bad)}" is not a row of {len(COLUMNS)} numbers'
    with pytest.raises(ModelError, match=named) as caught, Log(tmp_path, 2, start_step=1):
        pass
    assert caught.value.where.endswith("metrics.csv:3")
