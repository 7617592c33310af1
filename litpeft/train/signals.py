"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end the program before the first step, and later the run after its step."""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from litpeft.core.errors import INTERRUPTED, STOPPED
from litpeft.train.launch import SIGNALS, to_catch

NAMES = [one.name for one in SIGNALS]


class StopSignals:
    """Catches the signals in a `with` block; `asked` is the name of the first one."""

    def __init__(self, tell: Callable[[str], None]):
        self.tell, self.asked, self.training = tell, "", False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._ask) for number in to_catch()}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked and not self.training and not isinstance(error, SystemExit):
            sys.exit(exit_code(self.asked))  # some libraries turn the exit during their import into another error

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.training:
            self.asked = self.asked or name
            self.tell(f"{name}: no step was taken, there is nothing to save")
            sys.exit(exit_code(name))
        if self.asked and name == "SIGINT":
            raise KeyboardInterrupt  # a second Ctrl-C ends the program at once
        self.asked = self.asked or name
        self.tell(f"{name}: stopping after this step, then saving; Ctrl-C would end at once, and keep only checkpoints")


def exit_code(name: str) -> int:
    """Returns the exit code of a run that this signal ended, with its work saved."""
    return INTERRUPTED if name == "SIGINT" else STOPPED
