"""The heap of the C library, from which tensors of up to 32 MB come."""

import ctypes


def give_back() -> None:
    """Returns freed memory to the system, where the C library can.

    glibc keeps it, and does not find it again for tensors of the same size, since those are aligned: a program that
    frees the weights of one block before it makes those of the next would grow with every block.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
