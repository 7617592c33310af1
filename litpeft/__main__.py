"""`python -m litpeft` is the same as `litpeft`."""

import gc

from litpeft.cli import main
from litpeft.launch import leave


def program() -> None:
    """Runs the command of the command line and ends the process."""
    gc.disable()  # to look through all that is imported takes a seventh of its time; `dispatch` enables it again
    main()
    leave(0)


if __name__ == "__main__":
    program()
