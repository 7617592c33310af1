"""Two processes never work on one run."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from conftest import finetune, write_rows

from litpeft.cli import main
from litpeft.core.errors import UserError
from litpeft.core.folders import atomic_file, locked
from litpeft.core.place import check_place


def hold(path, pipe) -> None:
    with locked(path):
        pipe.send("working")
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that works on tmp_path / run."""
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "run", theirs))
    process.start()
    pipe.recv()
    yield process, pipe
    if process.is_alive():
        pipe.send("end")
    process.join()


@pytest.mark.parametrize("resume", ["true", "false"])
@pytest.mark.parametrize("out", ["x" * 5000, "file/run", "new/" + "x" * 256, "x" * 250])
def test_a_run_that_can_lie_nowhere_is_a_mistake_of_its_option(
    tiny_folder: Path, tmp_path: Path, out: str, resume: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    given = ["--base.dir", str(tiny_folder), "--data.path", str(write_rows(tmp_path)), "--out", str(tmp_path / out)]
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "lora", *given, "--resume", resume])
    assert stop.value.code == 2
    assert "this can be no folder" in capsys.readouterr().err


def test_a_second_run_on_the_same_folder_is_refused_and_names_the_first(tiny_folder, tmp_path, holder, capsys) -> None:
    for argv in ((), ("--overwrite",), ("--resume",)):
        with pytest.raises(SystemExit) as stop:
            finetune(tiny_folder, tmp_path, *argv)
        assert stop.value.code == 6
        assert f"process {holder[0].pid} on " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [None, signal.SIGKILL])
def test_the_folder_is_free_when_its_process_ends_however_that_happens(tmp_path, holder, number) -> None:
    process, pipe = holder
    with pytest.raises(UserError, match="is working on it"), locked(tmp_path / "run"):
        pass
    os.kill(process.pid, number) if number else pipe.send("end")
    process.join()
    with locked(tmp_path / "run"):
        assert (tmp_path / ".lock-run").read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with atomic_file(path) as handle:
        handle.write("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_place(tmp_path / "new" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to"):
        check_place(tmp_path / "new" / "run")
