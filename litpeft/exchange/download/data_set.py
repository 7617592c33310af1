"""Downloads a data set of the hub: into the cache that data.path uses, or with --out into a folder."""

from dataclasses import replace
from pathlib import Path

from litpeft.core.errors import ConfigError, scaled
from litpeft.core.folders import locked
from litpeft.core.hub import HubFile, Repository, difference, transfer
from litpeft.core.place import FREE_SPACE, check_disk, check_place, disk_fault
from litpeft.core.terminal import command_line, say
from litpeft.data.hub.address import Address
from litpeft.data.hub.fetch import Found
from litpeft.data.sources import found_parts
from litpeft.exchange.download.hub import tell_files
from litpeft.exchange.settings import Download


def fetch_set(named: Address, settings: Download) -> None:
    """Fetches the files that an address means: those to train on, the held-out and the test rows."""
    meant, names = found_parts(named)
    expected = {name: meant.listing.files[name] for name in names}
    folder = Path(settings.out) if settings.out else meant.listing.folder
    repo = Repository(meant.listing.name, meant.listing.commit, "dataset")
    if settings.dry_run:
        return tell_files(repo, meant.listing.commit, folder, expected)
    if settings.out:
        to_folder(repo, folder, expected)
    else:
        meant.fetch(names)
    size = scaled(sum(file.size for file in expected.values()), "B")
    say(f"{folder}: {len(expected)} files of {repo.name}@{repo.revision}, {size}, equal to the hub's")
    say(f"next: {command_line('data', 'show', shown(meant, named, settings), '--model', 'MODEL')}")


def to_folder(repo: Repository, folder: Path, expected: dict[str, HubFile]) -> None:
    """Writes files below a folder; those that are there already and equal are kept."""
    check_place(folder)
    pending = {name: file for name, file in expected.items() if difference(folder / name, file)}
    for name in pending:
        if (folder / name).exists() and not (folder / ".cache" / "huggingface").is_dir():
            hint = "give another --out, or delete the folder"
            raise ConfigError(f"already holds another {name} than {repo.name}", where=folder, hint=hint)
    check_disk(folder, sum(file.size for file in pending.values()), "the files", FREE_SPACE)
    try:
        with locked(folder):
            if pending:
                transfer(repo, repo.revision, folder, pending, cache=False)
    except OSError as error:
        raise (disk_fault(error, folder) or error) from None


def shown(meant: Found, named: Address, settings: Download) -> str:
    """Returns what data.path takes to read what was fetched."""
    if settings.out:
        return str(Path(settings.out) / meant.parts.train()[0])
    return str(replace(meant.address, revision=named.revision, rest=named.rest))
