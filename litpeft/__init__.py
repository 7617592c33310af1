"""litpeft: teach a language model something of your own, on the hardware you have."""

__version__ = "0.1.0"
