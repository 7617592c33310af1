"""`download --dry_run` lists what it would fetch, and `org/name@revision` names a revision."""

from pathlib import Path

from download_command import MODEL, SHARDS, content, refused, run
from loopback_hub import COMMIT, Hub

from litpeft.core.errors import ConfigError, ModelError, scaled


def test_a_dry_run_lists_sizes_and_fetches_nothing_until_asked(tmp_path: Path) -> None:
    size = scaled(sum(map(len, MODEL.values())), "B")
    with Hub(MODEL) as hub:
        done = run(tmp_path, "org/tiny@v1", "out", dry_run=True, HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
        *files, total = done.stdout.splitlines()
        assert [line.split()[-1] for line in files] == sorted(MODEL)
        shard = next(line for line in files if line.endswith(SHARDS[0]))
        assert shard.strip().startswith("4.1 kB")
        assert f"would download 6 files, {size}, of org/tiny@{COMMIT} to out" in total
        assert hub.transfers() == []
        assert not (tmp_path / "out").exists()
        assert any("/revision/v1" in path for _, path, *_ in hub.log)
        assert run(tmp_path, "org/tiny@v1", "out", HF_ENDPOINT=hub.url).returncode == 0
        assert content(tmp_path / "out") == MODEL
        again = run(tmp_path, "org/tiny", "out", dry_run=True, HF_ENDPOINT=hub.url)
        assert "would download 0 files, 0 B" in again.stdout
        refused(run(tmp_path, "org/tiny@nope", HF_ENDPOINT=hub.url), ModelError, "has no revision 'nope'")
        refused(run(tmp_path, "org/tiny@v1", revision="main", HF_ENDPOINT=hub.url), ConfigError, "the source says 'v1'")
