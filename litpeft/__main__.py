"""`python -m litpeft` is the same as `litpeft`."""

from litpeft.cli import main
from litpeft.launch import leave


def program() -> None:
    """Runs the command of the command line and ends the process."""
    main()
    leave(0)


if __name__ == "__main__":
    program()
