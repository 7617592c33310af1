"""Checkpoints of a run: whatever kills a save or damages a file, the newest whole one is found, bit for bit."""

import hashlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import finetune, write_rows
from safetensors.torch import load_file, save_file
from short_runs import forked
from torch import Tensor

import litpeft.core.safetensors
import litpeft.train.room
from litpeft.core.errors import ModelError, NumericError, ResourceError, UserError
from litpeft.core.place import check_disk
from litpeft.exchange.identity import changed, checksum
from litpeft.train.checkpoints import Checkpoint, Checkpoints

CALLS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}


def tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    delta = {"a.A": torch.randn(40, 30, generator=chance), "a.B": torch.randn(3, generator=chance).bfloat16()}
    return {
        "delta": delta,
        "optimizer": {"a.A/exp_avg": torch.randn(40, 30, generator=chance), "a.A/step": torch.ones(())},
    }


def state(seed: int) -> dict:
    return {"seed": seed, "losses": [1 / 3, 5e-324, 0.1 + 0.2, float(seed)], "rng": "é"}


def save(checkpoints: Checkpoints, step: int, seed: int | None = None, keep: tuple[int, ...] = ()) -> None:
    seed = step if seed is None else seed
    checkpoints.save(step, tensors(seed), state(seed), {"base": "abc", "settings": {"lr": 0.001}}, keep)


def made(folder: Path, *steps: int) -> Checkpoints:
    """Returns the checkpoints in a folder after these steps were saved there; what they tell is in `.told`."""
    told: list[str] = []
    checkpoints = Checkpoints(folder, tell=told.append)
    checkpoints.told = told
    for step in steps:
        save(checkpoints, step)
    return checkpoints


def seed_of(checkpoint: Checkpoint) -> int:
    """Returns the seed that a checkpoint was made from, after a look at every bit of it."""
    seed = checkpoint.state["seed"]
    assert checkpoint.state == state(seed)
    assert checkpoint.facts == {"base": "abc", "settings": {"lr": 0.001}}
    for stem, named in tensors(seed).items():
        saved = checkpoint.tensors(stem)
        assert saved.keys() == named.keys()
        assert all(torch.equal(saved[n], t) and saved[n].dtype == t.dtype for n, t in named.items())
    return seed


def killed(action: Callable[[], object], k: int) -> bool:
    """Runs `action` in a process that dies just before its k-th call of the file system; returns whether it died."""
    process = forked(die_at, action, k)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def die_at(action: Callable[[], object], k: int) -> None:
    numbers = itertools.count(1)

    def count() -> None:
        if next(numbers) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    def half_then_whole(named: dict[str, Tensor], path: Path, **more: object) -> None:
        count()
        save_file(named, path, **more)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        count()
        path.write_bytes(content)

    torch.set_num_threads(1)
    fsync = os.fsync
    os.fsync = lambda handle: (count(), fsync(handle))
    litpeft.core.safetensors.save_file = half_then_whole
    seen = True
    sys.addaudithook(lambda event, args: seen and event in CALLS and count())
    action()
    seen = False  # what follows is the end of the process


def begin_and_save(folder: Path, step: int, seed: int) -> None:
    save(Checkpoints(folder), step, seed)


def no_leftovers(folder: Path) -> bool:
    return not any(path.name.startswith(".tmp") for path in folder.iterdir())


@pytest.mark.parametrize(
    ("before", "step"),
    [((), 1), ((1, 2), 3), ((1, 2), 1)],
    ids=["the first", "with a prune", "a step before the newest"],
)
def test_a_save_killed_at_any_call_leaves_the_newest_or_the_new_one(before: tuple, step: int, tmp_path) -> None:
    made(tmp_path / "start", *before)
    (tmp_path / "start").mkdir(exist_ok=True)
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        shutil.copytree(tmp_path / "start", folder)
        died = killed(partial(begin_and_save, folder, step, 100), k)
        after = made(folder)
        assert no_leftovers(folder)
        newest = after.newest()
        assert (seed_of(newest) if newest else None) in (before[-1] if before else None, 100)
        assert not after.told
        save(after, step, seed=200)
        assert seed_of(after.newest()) == 200
        assert no_leftovers(folder)
        if not died:
            break
    assert k > 30  # the calls were seen


def test_the_only_checkpoint_is_replaced_or_kept_even_if_the_clearing_up_is_killed_too(tmp_path) -> None:
    made(tmp_path / "start", 1)
    twice = 0
    for k in itertools.count(1):
        once = tmp_path / f"{k}"
        shutil.copytree(tmp_path / "start", once)
        died = killed(partial(begin_and_save, once, 1, 100), k)
        for j in itertools.count(1):
            folder = tmp_path / f"{k}-{j}"
            shutil.copytree(once, folder)
            # of what else can be left there is nothing to lose
            died_again = any(once.glob(".tmp-*-old")) and killed(partial(Checkpoints, folder), j)
            assert seed_of(made(folder).newest()) in (1, 100)
            assert no_leftovers(folder)
            twice += died_again
            if not died_again:
                break
        if not died:
            break
    assert twice > 20


def test_files_are_on_the_disk_before_the_folder_has_its_name_and_old_ones_go_last(tmp_path, monkeypatch) -> None:
    checkpoints = made(tmp_path / "run" / "checkpoints", 1, 2)
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append((Path(a).name, Path(b).name)), rename(a, b)))
    save(checkpoints, 3)
    temporary, gone = f".tmp-step-00000003-{os.getpid()}", f".tmp-step-00000001-{os.getpid()}"
    named = calls.index((temporary, "step-00000003"))
    folder = checkpoints.folder / "step-00000003"
    assert sorted(calls[: named - 1]) == sorted(path.stat().st_ino for path in folder.iterdir())
    assert calls[named - 1] == folder.stat().st_ino
    assert calls[named + 1 :] == [checkpoints.folder.stat().st_ino, ("step-00000001", gone)]


def damage(folder: Path, other: Path, chance: random.Random) -> None:
    """Changes one thing of the checkpoint in `folder`; `other` is an older one."""
    file = chance.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    kind = chance.choice(["truncate", "append", "flip", "zero", "delete", "swap", "older", "folder"])
    if kind == "truncate":
        file.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "append":
        file.write_bytes(data + bytes([chance.randrange(256)]))
    elif kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
    elif kind == "zero":
        begin = chance.randrange(0, len(data), 4096)
        file.write_bytes(data[:begin] + bytes(len(data[begin : begin + 4096])) + data[begin + 4096 :])
    elif kind == "swap":
        second = chance.choice([path for path in sorted(folder.iterdir()) if path != file])
        file.write_bytes(second.read_bytes())
        second.write_bytes(data)
    elif kind == "older":
        shutil.copyfile(other / file.name, file)
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path) -> None:
    made(tmp_path / "start", 1, 2)
    for seed in range(120):
        folder = tmp_path / str(seed)
        shutil.copytree(tmp_path / "start", folder)
        damage(folder / "step-00000002", folder / "step-00000001", random.Random(seed))
        checkpoints = made(folder)
        newest = checkpoints.newest()
        if newest.step == 2:  # a space of the manifest became another one: nothing that it says has changed
            assert seed_of(newest) == 2
            continue
        assert seed_of(newest) == 1, seed
        assert len(checkpoints.told) == 1
        assert checkpoints.told[0].startswith("checkpoint step-00000002 is passed over (")
        assert checkpoints.told[0].endswith("): step-00000001 is taken")
        with pytest.raises(ModelError) as error:
            checkpoints.at(2)
        assert f" is passed over ({error.value.what}): " in checkpoints.told[0]
        assert (error.value.hint, error.value.exit_code) == ("take another: 1", 4)


@pytest.mark.parametrize(
    ("file", "change", "why"),
    [
        ("delta.safetensors", lambda data: data[:-100], r"delta.safetensors: size \d+ of \d+"),
        ("optimizer.safetensors", lambda data: data[:-1] + b"!", "optimizer.safetensors: sha256 mismatch"),
        ("state.json", lambda data: data.replace(b"0", b"1"), "state.json: sha256 mismatch"),
        ("MANIFEST.json", lambda data: data.replace(b"0.001", b"0.002"), "MANIFEST.json: checksum mismatch"),
        ("MANIFEST.json", lambda data: b"", "MANIFEST.json: the file cannot be read"),
        ("MANIFEST.json", lambda data: b"[1]", "MANIFEST.json: the file must be a JSON object, got list"),
        ("MANIFEST.json", lambda data: b"[" * 100_000, "MANIFEST.json: the file cannot be read"),
        ("MANIFEST.json", lambda data: b'{"step": ' + b"9" * 5000 + b"}", "MANIFEST.json: the file cannot be read"),
        ("MANIFEST.json", lambda data: b"\xff\xfe", "MANIFEST.json: the file cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(file: str, change, why: str, tmp_path) -> None:
    checkpoints = made(tmp_path, 7)
    path = tmp_path / "step-00000007" / file
    path.write_bytes(change(path.read_bytes()))
    assert checkpoints.newest() is None
    assert len(checkpoints.told) == 1
    assert checkpoints.told[0].endswith("): there is no whole one before it")
    with pytest.raises(UserError, match=why):
        checkpoints.at(7)


def forged(folder: Path, **changes: object) -> None:
    """Rewrites a manifest as one who knows its checksum can."""
    path = folder / "MANIFEST.json"
    record = json.loads(path.read_text()) | changes
    record.pop("checksum")
    path.write_text(json.dumps(record | {"checksum": checksum(record)}))


@pytest.mark.parametrize(
    "name",
    ["../canary.json", "/etc/passwd", "a/../../canary.json", "..", "", "a\0.json", "C:\\a.json", "é.json", "\ud800"],
)
def test_a_manifest_that_points_outside_its_folder_is_refused(name: str, tmp_path) -> None:
    checkpoints = made(tmp_path, 1)
    (tmp_path / "canary.json").write_text("{}")
    files = json.loads((tmp_path / "step-00000001" / "MANIFEST.json").read_text())["files"]
    forged(tmp_path / "step-00000001", files=files | {name: {"size": 2, "sha256": "0"}})
    with pytest.raises(UserError, match="escapes the checkpoint's folder"):
        checkpoints.at(1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "format '2' is not of this version"),
        ({"files": [1]}, "is not of this version"),
        ({"facts": None}, "is not of this version"),
        ({"files": {}}, "does not name state.json"),
        ({"files": {"state.json": 3}}, "state.json: size"),
        ({"files": {"state.json": {"size": None, "sha256": {}}}}, "state.json: size"),
        ({"files": {"state.json": {}, "x" * 400 + ".json": {}}}, "state.json: size"),
        ({"step": 2}, "is of step '2'"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(changes: dict, why: str, tmp_path) -> None:
    checkpoints = made(tmp_path, 1)
    forged(tmp_path / "step-00000001", **changes)
    with pytest.raises(UserError, match=why):
        checkpoints.at(1)


def test_a_file_that_is_a_link_or_no_safetensors_is_refused(tmp_path) -> None:
    checkpoints = made(tmp_path / "run", 1)
    folder = tmp_path / "run" / "step-00000001"
    files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    (folder / "bad.safetensors").write_bytes(b"?")
    digest = litpeft.core.checksums.file_sha256(folder / "bad.safetensors")
    forged(folder, files=files | {"bad.safetensors": {"size": 1, "sha256": digest}})
    with pytest.raises(UserError, match="bad.safetensors: not a whole safetensors file"):
        checkpoints.at(1)
    forged(folder, files=files)
    assert seed_of(checkpoints.at(1)) == 1
    os.rename(folder / "state.json", tmp_path / "state.json")
    (folder / "state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(UserError, match="escapes the checkpoint's folder"):
        checkpoints.at(1)


def test_the_order_is_of_steps_whatever_the_clock_says(tmp_path) -> None:
    checkpoints = made(tmp_path, 9, 10)
    for path in (tmp_path / "step-00000010", *(tmp_path / "step-00000010").iterdir()):
        os.utime(path, (0, 0))
    assert seed_of(made(tmp_path).newest()) == 10
    save(checkpoints, 11)
    assert checkpoints.steps() == [10, 11]


def test_the_newest_whole_ones_and_the_best_are_kept(tmp_path) -> None:
    checkpoints = made(tmp_path, 1, 2)
    for step in (3, 4, 5):
        save(checkpoints, step, keep=(2,))
    assert checkpoints.steps() == [2, 4, 5]
    (tmp_path / "step-00000005" / "state.json").unlink()
    save(checkpoints, 6, keep=(2,))
    assert checkpoints.steps() == [2, 4, 6]  # 5 is broken: it counts for nothing
    assert [seed_of(checkpoints.at(step)) for step in (2, 4, 6)] == [2, 4, 6]
    only = Checkpoints(tmp_path, keep_last=1)
    save(only, 7)
    assert only.steps() == [7]


def test_a_run_that_went_back_leaves_no_later_checkpoint_to_resume_from(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in (2, 4, 6):
        save(checkpoints, step)
    assert seed_of(checkpoints.at(2)) == 2
    save(checkpoints, 4, seed=44)
    assert checkpoints.steps() == [2, 4]
    assert seed_of(checkpoints.newest()) == 44


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path) -> None:
    for name in ("step-1", "step-00000003.bak", "notes", ".tmp-step-x", f".tmp-step-00000001-{os.getppid()}"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-00000008").symlink_to(tmp_path / "notes")
    before = set(tmp_path.iterdir())
    checkpoints = made(tmp_path, 2, 3, 4)
    assert checkpoints.steps() == [3, 4]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "step-00000003", tmp_path / "step-00000004"}
    assert before <= set(tmp_path.iterdir())
    with pytest.raises(UserError, match="there is no checkpoint of step 2; there is 3, 4"):
        checkpoints.at(2)
    with pytest.raises(UserError, match="this checkpoint holds no model.safetensors"):
        checkpoints.at(3).tensors("model")
    assert Checkpoints(tmp_path / "none").newest() is None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t, s, f: t["delta"]["a.B"].__setitem__(1, float("nan")), "delta: a.B"),
        (lambda t, s, f: t["optimizer"]["a.A/exp_avg"].__setitem__((0, 0), float("-inf")), "optimizer: a.A/exp_avg"),
        (lambda t, s, f: s["losses"].append(float("inf")), "state: losses: 4"),
        (lambda t, s, f: f.update(loss=float("nan")), "facts: loss"),
    ],
)
def test_what_is_not_finite_is_named_and_nothing_is_written(change, name: str, tmp_path) -> None:
    checkpoints = made(tmp_path, 1)
    parts = tensors(2), state(2), {}
    change(*parts)
    with pytest.raises(NumericError, match=f"{name} is not finite at step 2: no checkpoint is written") as error:
        checkpoints.save(2, *parts)
    assert error.value.exit_code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_tensors_that_share_memory_or_are_strided_are_saved_as_they_are(tmp_path) -> None:
    one = torch.arange(12.0).reshape(3, 4)
    parts = {"x": one, "again": one, "turned": one.T, "row": one[1], "none": torch.zeros(0, 4), "byte": one.byte()}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"delta": parts}, {}, {})
    saved = checkpoints.newest().tensors("delta")
    assert all(torch.equal(saved[name], tensor) and saved[name].dtype == tensor.dtype for name, tensor in parts.items())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000001").iterdir()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("limit", [3000, 10_000])  # bytes of a file: the tensors do not fit, or only state.json
@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk_keeps_what_is_there_and_says_so(limit: int, step: int, tmp_path) -> None:
    made(tmp_path, 1, 2)
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            Checkpoints(tmp_path).save(step, tensors(3), {"long": "x" * 20_000}, {})
        except ResourceError as error:
            told = f"the checkpoint of step {step} is not written, the ones before are as they were" in error.what
            os._exit(error.exit_code if told and str(tmp_path) in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    assert no_leftovers(tmp_path)
    assert [seed_of(Checkpoints(tmp_path).at(number)) for number in (1, 2)] == [1, 2]


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(ResourceError, match="the checkpoint of step 1 is not written, the ones before are as they"):
        save(Checkpoints(tmp_path / "run" / "checkpoints"), 1)


def test_too_little_room_is_said_before_the_run(tmp_path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_disk(tmp_path / "not" / "there" / "yet", free // 2, "the checkpoints", "")
    with pytest.raises(ResourceError, match=r"checkpoints need [\d.]+ GB, the disk has [\d.]+ GB left") as error:
        check_disk(tmp_path / "not" / "there" / "yet", 2 * free, "the checkpoints", "")
    assert error.value.exit_code == 6


@pytest.mark.parametrize(("stem", "name"), [("delta", "a.B"), ("optimizer", "a.A/exp_avg"), ("state", "losses: 1")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_that_holds_a_number_that_is_not_finite_is_named_and_passed_over(
    stem: str, name: str, value: float, tmp_path
) -> None:
    checkpoints = made(tmp_path, 1, 2)
    file = next((tmp_path / "step-00000002").glob(f"{stem}.*"))
    if stem == "state":
        file.write_text(json.dumps(state(2) | {"losses": [1.0, value]}))
    else:
        changed = tensors(2)[stem]
        changed[name].view(-1)[-1] = value
        save_file(changed, file)
    path = tmp_path / "step-00000002" / "MANIFEST.json"
    record = json.loads(path.read_text())
    data = file.read_bytes()
    record["files"][file.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del record["checksum"]
    path.write_text(json.dumps(record | {"checksum": checksum(record)}))  # whoever wrote it, its sums are right
    newest = Checkpoints(tmp_path, tell=checkpoints.told.append).newest()
    assert newest.step == 1
    assert checkpoints.told == [
        f"checkpoint step-00000002 is passed over ({file.name}: {name} is not finite): step-00000001 is taken"
    ]


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        ((), 4),  # the last two, the best and the one being written
        (("--checkpoint.interval", "0"), 4),  # the best is still saved, when it comes
        (("--data.validation_split", "0"), 3),
        (("--data.validation_split", "0", "--checkpoint.keep_last", "1"), 2),
        (("--data.validation_split", "0", "--checkpoint.interval", "0"), 1),  # of a run that is stopped
    ],
)
def test_the_room_is_that_of_the_checkpoints_that_can_come_to_be(
    tiny_folder, tmp_path, monkeypatch, argv: tuple[str, ...], kept: int
) -> None:
    asked = []
    monkeypatch.setattr(litpeft.train.room, "check_disk", lambda folder, needed, *said: asked.append(needed))
    data = write_rows(tmp_path)
    held_out = "--data.validation_split" not in argv
    run = finetune(tiny_folder, tmp_path, "--data.path", str(data if held_out else data / "train.jsonl"), *argv)
    files = (run / "final").glob("*.safetensors")
    sizes = {file.name: sum(tensor.nbytes for tensor in load_file(file).values()) for file in files}
    assert len(sizes) == 2  # what was learned, and the same for peft
    weights = sizes["delta.safetensors"]
    assert asked == [3 * weights * kept + sum(sizes.values())]  # two moments beside each weight


def test_settings_that_changed_are_listed_unless_a_glob_allows_them() -> None:
    then = {"train": {"lr": 0.001, "args": {"betas": [0.9, 0.95]}, "seed": 0}, "out": "a", "old": None, "same": (1, 2)}
    now = {"train": {"lr": 0.002, "args": {"betas": (0.9, 0.99)}, "seed": 0}, "out": "b", "new": True, "same": [1, 2]}
    assert changed(then, now, ()) == [
        "train.lr: 0.001 -> 0.002",
        "train.args.betas: [0.9, 0.95] -> [0.9, 0.99]",
        'out: "a" -> "b"',
        "old: null -> not set",
        "new: not set -> true",
    ]
    assert changed(then, now, ("train.*", "o*", "new")) == []
    assert changed(json.loads(json.dumps(then)), then, ()) == []
