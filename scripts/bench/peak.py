"""Runs a command; prints its peak resident memory, what of it belongs to no file, and its seconds.

    python scripts/bench/peak.py litpeft merge RUN --no_verify

Resident pages of a file that is mapped into memory count as resident, though the system takes them back when another
process needs the room: the second figure, the peak of RssAnon as seen 100 times a second, is without them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path


def anonymous(process: int) -> int:
    """Returns the bytes of a process's memory that belong to no file; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.partition(":")[0] == "RssAnon"), 0)


def measured(command: list[str]) -> tuple[int, int, int, float]:
    """Returns a command's exit code, its peak resident bytes, those of no file, and its seconds."""
    began, most = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, most, time.perf_counter() - began
        most = max(most, anonymous(process.pid))
        time.sleep(0.01)


if __name__ == "__main__":
    code, resident, of_no_file, seconds = measured(sys.argv[1:])
    print(f"peak {resident / 1e9:.2f} GB, {of_no_file / 1e9:.2f} GB of no file, {seconds:.1f} s, exit code {code}")
    sys.exit(code)
