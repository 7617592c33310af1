"""Which files of a repository are of which configuration and split, as the datasets library sees them.

The card (README.md) may say it in its `configs`. Else it is seen from names: data/train-00000-of-00002.parquet,
main/test.jsonl, de/validation/0000.parquet; a folder above the split is a configuration.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from litpeft.core.errors import DataError, some
from litpeft.data.hub.address import Address
from litpeft.data.readers import ALL, kind

TRAIN = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval")  # names of held-out rows
TEST = ("test", "testing", "evaluation")
DEFAULT = "default"  # the configuration of files that stand in none
BESIDE = ("readme", "license", "licence", "dataset_infos", "dataset_info")  # files that hold no rows
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-.+)?\.[a-z.]+")  # train_sft-00000-of-00003.parquet, perhaps with a hash
MANY = 12  # names that a message lists

Splits = dict[str, list[str]]  # split -> files


@dataclass(frozen=True)
class Layout:
    """The files of a repository: configuration -> split -> files."""

    configs: dict[str, Splits]
    default: str | None = None  # the configuration that is meant where none is named


def rows_files(names: Collection[str]) -> list[str]:
    """Returns the files that can hold rows."""
    found = [PurePosixPath(name) for name in sorted(names)]
    found = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [str(path) for path in found if kind(Path(path))[0] and path.name.split(".")[0].lower() not in BESIDE]


def layout(names: Collection[str], card: bytes) -> Layout:
    """Returns the files by configuration and split; `card` is the README.md, empty if there is none."""
    files, entries = rows_files(names), card_configs(card)
    said = {str(entry.get("config_name", DEFAULT)): _splits(entry, files) for entry in entries}
    said = {config: splits for config, splits in said.items() if splits}
    chosen = next((str(entry.get("config_name")) for entry in entries if entry.get("default") is True), DEFAULT)
    configs = said or by_names(files)
    return Layout(configs, next(iter(configs), None) if len(configs) < 2 else chosen if chosen in configs else None)


def card_configs(card: bytes) -> list[dict[str, Any]]:
    """Returns the configurations that a card names."""
    head = re.match(r"---\s*\n(.*?)\n---", card.decode(errors="replace").replace("\r\n", "\n"), re.S)
    try:
        facts = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:  # the hub warns its author; the files' names are left
        return []
    configs = facts.get("configs") if isinstance(facts, dict) else None
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _splits(entry: dict[str, Any], files: Sequence[str]) -> Splits:
    """Returns the splits of a configuration of the card."""
    folder, data_files = str(entry.get("data_dir") or ""), entry.get("data_files")
    inside = [file for file in files if file.startswith(f"{folder}/")] if folder else list(files)
    if data_files is None:
        found = by_names([file.removeprefix(f"{folder}/") for file in inside]) if folder else {}
        return {split: [f"{folder}/{name}" for name in names] for one in found.values() for split, names in one.items()}
    parts = data_files if isinstance(data_files, list) else [data_files]
    splits: Splits = {}
    for part in parts:
        split, patterns = (part.get("split"), part.get("path")) if isinstance(part, dict) else ("train", part)
        patterns = patterns if isinstance(patterns, list) else [patterns]
        full = [f"{folder}/{pattern}" if folder else str(pattern) for pattern in patterns]
        found = [file for file in inside if any(matches(file, pattern) for pattern in full)]
        splits.setdefault(str(split), []).extend(found)
    return {split: found for split, found in splits.items() if found}


def matches(file: str, pattern: str) -> bool:
    """Returns whether a glob means a file: * stays within a folder, ** does not."""
    pattern = pattern.removeprefix("./")
    if "**" in pattern:
        return fnmatchcase(file, pattern.replace("**/", "*"))
    return file.count("/") == pattern.count("/") and fnmatchcase(file, pattern)


def by_names(files: Sequence[str]) -> dict[str, Splits]:
    """Returns what the names of files and folders say; where they name no split, all is of the split train."""
    found: dict[str, Splits] = {}
    for file in files:
        config, split = _named(PurePosixPath(file))
        if split:
            found.setdefault(config, {}).setdefault(split, []).append(file)
    return found or ({DEFAULT: {"train": list(files)}} if files else {})


def _named(path: PurePosixPath) -> tuple[str, str]:
    """Returns the configuration and the split that a path names; "" for no split."""
    folders, split = list(path.parts[:-1]), ""
    if shard := SHARD.fullmatch(path.name):
        split = shard[1]
    else:
        words = re.split(r"[^a-z]+", path.name.lower())
        split = next((names[0] for names in (TRAIN, HELD_OUT, TEST) if set(names) & set(words)), "")
    at = next((i for i, part in enumerate(folders) if part.removeprefix("partial-") in (*TRAIN, *HELD_OUT, *TEST)), -1)
    if at >= 0:
        folders, split = folders[:at], folders[at]
    return "/".join(part for part in folders if part != "data") or DEFAULT, split


@dataclass(frozen=True)
class Parts:
    """The files that an address names, if it names any, or else the splits of its configuration."""

    address: Address
    named: list[str]
    splits: Splits

    def train(self) -> list[str]:
        """Returns the files of rows to train on."""
        split = next((name for name in TRAIN if name in self.splits), None)
        if not self.named and split is None:
            what = f"it has no split called train, but {listed(self.splits)}"
            hint = f"choose one: {self.address.part(next(iter(self.splits)))}"
            raise DataError(what, where=self.address, hint=hint)
        return self._of_one_kind(self.named or self.splits[split])

    def held_out(self) -> list[str]:
        """Returns the files of held-out rows, if the address names no part and there are any."""
        split = next((name for name in HELD_OUT if name in self.splits), None)
        return self._of_one_kind(self.splits[split]) if split else []

    def measured(self) -> str | None:
        """Returns the split to measure on where the address names no part: held-out rows, else the test's."""
        return next((name for name in (*HELD_OUT, *TEST) if name in self.splits), None)

    def _of_one_kind(self, files: list[str]) -> list[str]:
        """Returns the files of a split; raises if they are of several kinds, which may be copies of one another."""
        if len({kind(Path(file))[0] for file in files}) > 1:
            what = f"the split has files of several kinds, perhaps the same rows twice: {listed(files)}"
            raise DataError(what, where=self.address, hint=f"name those to take: {self.address.part(files[0])}")
        return files


def parts_of(address: Address, names: Collection[str], card: bytes) -> Parts:
    """Returns what an address means in a repository that holds these files."""
    files, found, rest = rows_files(names), layout(names, card), (address.rest or "").strip("/")
    if not found.configs:
        what = f"it holds no file of rows, but {some(sorted(names)) or 'nothing'}"
        raise DataError(what, where=address, hint=f"a data file ends in {ALL}")
    named = [file for file in files if file == rest] or [file for file in files if matches(file, rest)]
    if named:
        return Parts(address, named, {})
    config, _, split = rest.rpartition("/")  # main/train, as in the hub's own Parquet copies
    if address.config is None and split in found.configs.get(config, {}):
        return Parts(address, found.configs[config][split], {})
    inside = [file for file in files if rest and file.startswith(f"{rest}/")]
    if inside and not any(rest in splits for splits in found.configs.values()):
        below = by_names(inside)
        return Parts(address, [], {name: below[one][name] for one in below for name in below[one]})
    splits = found.configs[_config(address, found)]
    if rest and rest not in splits:
        what = f"{rest!r} is no split, file or folder of it; splits: {listed(splits)}; files: {listed(files)}"
        raise DataError(what, where=address)
    return Parts(address, splits[rest], {}) if rest else Parts(address, [], splits)


def _config(address: Address, found: Layout) -> str:
    config = address.config or found.default
    if config in found.configs:
        return config
    wanted = f"there is no configuration {config!r}; there are" if config else "it has several configurations:"
    hint = f"choose one: {replace(address, config=next(iter(found.configs)))}"
    raise DataError(f"{wanted} {listed(found.configs)}", where=address, hint=hint)


def listed(names: Collection[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(list(names)[:MANY]) + more
