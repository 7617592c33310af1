"""`python -m litpeft` is the same as `litpeft`."""

from litpeft.cli import main

if __name__ == "__main__":
    main()
