"""Whether something can be written at a place: the names in its path, the rights, and the room on its disk."""

import errno
import os
import shutil
from pathlib import Path

from litpeft.core.errors import ConfigError, ResourceError, UserError, scaled

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a file that has no room to grow
FREE_SPACE = "free some space, or give another --out"
LONGEST_NAME = 255  # bytes, of the file systems in use


def check_place(path: Path) -> None:
    """Raises if `path` cannot be a folder: a name is too long, a parent is a file, or cannot be written to."""
    why = ""
    try:
        path.lstat()
    except FileNotFoundError:  # what is beside it while it is written has the longest name
        names = (*path.parts, f".tmp-{path.name}-{os.getpid()}-old")
        why = "a name in it is too long" if max(len(os.fsencode(name)) for name in names) > LONGEST_NAME else ""
    except OSError as error:
        why = error.strerror
    there = path.absolute().parent
    while not why and not there.exists():
        there = there.parent
    if not why and not os.access(there, os.W_OK):
        why = f"{there} cannot be written to"
    if why:
        raise ConfigError(f"this can be no folder: {why}", where=path, hint="name another")


def check_disk(folder: Path, needed: int, what: str, hint: str) -> None:
    """Raises if the file system of `folder`, which need not exist yet, has fewer bytes free than `what` need."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        need, left, short = (scaled(count, "B") for count in (needed, free, needed - free))
        what = f"{what} need {need}, the disk has {left} left: {short} too little"
        raise ResourceError(what, where=folder, hint=hint)


def disk_fault(error: BaseException, folder: Path) -> UserError | None:
    """Returns the UserError for an error of the local disk, None for any other error."""
    number = getattr(error, "errno", None)
    barred = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)
    if number in FULL:
        hint = "free some space and run the same command again, or name another place (--out, --output)"
        return ResourceError(f"the disk is full ({os.strerror(number)})", where=folder, hint=hint)
    if number in (*barred, errno.EIO):
        hint = "name another place (--out, --output)"
        return ResourceError(f"cannot write there ({os.strerror(number)})", where=folder, hint=hint)
    return None
