"""How a data set of the hub, or a preset, is spelled.

hf://ORG/NAME[@REVISION][:CONFIGURATION][/SPLIT or /FILE or /GLOB]; hf://datasets/ORG/NAME means the same. A preset is
preset:NAME[@REVISION][/SPLIT or /FILE or /GLOB], or its NAME alone where no file or folder has that name.
"""

import os
import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from urllib.parse import unquote

from litpeft.core.errors import ConfigError, DataError
from litpeft.data.presets import PRESETS, Preset

HUB, PRESET = "hf://", "preset:"
SPELLING = "hf://ORG/NAME[@REVISION][:CONFIGURATION][/SPLIT or /FILE or /GLOB]"
REVISION = r"(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/:@]+))?"
REST = r"(?:/(?P<rest>.+))?"
OF_HUB = re.compile(rf"hf://(?:datasets/)?(?P<name>\w[\w.-]*/\w[\w.-]*){REVISION}(?::(?P<config>[^/:@]+))?{REST}")
OF_PRESET = re.compile(rf"preset:(?P<name>[^/:@]+){REVISION}{REST}")
PAGE = re.compile(r"(?:https?://)?(?:www\.)?huggingface\.co/datasets/([\w.-]+/[\w.-]+)")  # what a browser shows
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class Address:
    """A data set of the hub, or a part of it."""

    name: str  # org/name
    revision: str | None = None
    config: str | None = None
    rest: str | None = None  # a split, a file, a glob of files or a folder
    preset: str | None = None  # the preset that it came from

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        rest = f"/{self.rest}" if self.rest else ""
        if self.preset:
            return f"{PRESET}{self.preset}{at}{rest}"
        return f"{HUB}{self.name}{at}{f':{self.config}' if self.config else ''}{rest}"

    @property
    def shape(self) -> Preset | None:
        """The preset that says what its rows mean, if it is one's."""
        return PRESETS[self.preset] if self.preset else None

    def part(self, rest: str | None) -> "Address":
        """Returns the address of a part."""
        return replace(self, rest=rest)


def address(path: str) -> Address | None:
    """Returns what a path says of the hub, None for a path on this disk; raises if it is misspelt or ambiguous."""
    if path in PRESETS:
        if os.path.exists(path):
            hint = f"write ./{path} for the one here, {PRESET}{path} for the preset"
            raise ConfigError("is a preset, and also a file or folder here", where=f"data.path {path}", hint=hint)
        return address(f"{PRESET}{path}")
    if path.startswith(PRESET):
        parts = OF_PRESET.fullmatch(path)
        if parts is None or parts["name"] not in PRESETS:
            name = parts["name"] if parts else path.removeprefix(PRESET)
            raise ConfigError(f"there is no preset {name[:60]!r}{meant(name)}", hint=f"presets: {', '.join(PRESETS)}")
        whole = address(PRESETS[parts["name"]].source)
        return replace(whole, revision=parts["revision"], rest=parts["rest"], preset=parts["name"])
    if not path.startswith(HUB):
        return None
    parts = OF_HUB.fullmatch(path)
    if parts is None or parts["name"].startswith("datasets/"):
        raise ConfigError(f"{path[:100]!r} is no data set of the hub", where="data.path", hint=f"write {SPELLING}")
    revision = unquote(parts["revision"]) if parts["revision"] else None
    revision = CONVERTED if revision == "~parquet" else revision
    return Address(parts["name"], revision, parts["config"], parts["rest"])


def meant(name: str) -> str:
    """Returns the preset that a name may mean, as a question."""
    near = get_close_matches(name.lower().replace("-", "_"), PRESETS, 1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def no_file(path: str, what: str) -> DataError:
    """Returns the error for a path that is on no disk, with a hint if it looks like a data set of the hub."""
    if page := PAGE.match(path):
        hint = f"for the data set of that page: {HUB}{page[1]}"
    elif near := meant(path):
        hint = f"a preset, perhaps{near}"
    else:
        org_and_name = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.isdir(os.path.dirname(path))
        hint = f"for the data set of the hub: {HUB}{path}" if org_and_name else ""
    return DataError(what, where=path, hint=hint)
