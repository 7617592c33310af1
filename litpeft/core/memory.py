"""Recognises out-of-memory errors of any library, and says what helps."""

import errno
import re

from litpeft.core.errors import ResourceError, UserError

# texts of out-of-memory errors without a class of their own: torch and its libraries, C++, Rust, numpy, threads
SIGNS = (
    "DefaultCPUAllocator",
    "out of memory",
    "unable to mmap",
    "Cannot allocate memory",
    "Unable to allocate",
    "could not create a primitive",
    "could not create a memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "can't start new thread",
)
HELPS = {
    "finetune": "lower train.micro_tokens or data.max_length, or set train.activation_checkpointing block",
    "evaluate": "lower batch_size, or take quantize nf4 or precision bf16-true",
    "generate": "lower batch_size or sampling.max_new_tokens, or take quantize nf4 or precision bf16-true",
    "chat": "take quantize nf4 or precision bf16-true",
}
ELSE = "close other programs that hold memory, or raise the limit of this one (ulimit -v, the job's)"


def out_of_memory(error: BaseException | None) -> bool:
    """Returns whether an error, or one in its chain of causes, is a lack of memory."""
    while error is not None:
        text, name = str(error), type(error).__name__
        if isinstance(error, MemoryError) or name == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if not isinstance(error, UserError) and any(sign in text for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def asked_for(error: BaseException | None) -> str:
    """Returns ` (1.2 GB were asked for)`, or "" if no error of the chain says how much."""
    while error is not None:
        found = re.search(r"(?:allocate|mmap|allocation of) ([\d.]+) ?([KMGTPE]?i?B|bytes)\b", str(error))
        if found:
            return f" ({found[1]} {found[2]} were asked for)"
        error = error.__cause__ or error.__context__
    return ""


def memory_error(error: BaseException, command: str) -> UserError:
    """Returns the UserError for a lack of memory in this command."""
    text = " ".join(str(getattr(error, "what", error)).split())[:160]
    what = f"out of memory{asked_for(error)}: {text or type(error).__name__}"
    return ResourceError(what, hint=HELPS.get(command, ELSE))
