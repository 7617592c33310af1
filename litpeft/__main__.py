"""`python -m litpeft` is the same as `litpeft`."""

import gc

from litpeft.cli import main
from litpeft.train.launch import exit_now


def program() -> None:
    """Runs the command of the command line and ends the process."""
    gc.disable()  # to look through all that is imported takes a seventh of its time; `dispatch` enables it again
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else bool(stop.code)
    exit_now(int(code))


if __name__ == "__main__":
    program()
