"""Which process did it, and is it still there? How what a killed process left is recognised.

A clock may be set and a process id is used again, so a process is known by its machine, the boot of
that machine, the namespace that its id belongs to, its id, and the kernel's count of ticks when it
started.
"""

import os
import socket
from pathlib import Path


def this_process() -> str:
    """Return the identity of this process: five words."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def is_gone(process: str) -> bool:
    """Tell whether a process has ended. Of other machines and containers nothing is known."""
    words, here = process.split(" "), _machine().split(" ")
    if words[0] != here[0]:
        return False
    if len(words) == 3 and words[1].isdecimal():  # as an earlier release wrote it
        return _started(int(words[1])) == "ended"
    if len(words) != 5:
        return False
    if words[1] != here[1]:
        return True  # this machine, before it was started anew
    if words[2] != here[2] or not words[3].isdecimal():
        return False
    return _started(int(words[3])) != words[4]


def _machine() -> str:
    """Return host, boot and process namespace; the last two are known on Linux only."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return " ".join(
        (
            socket.gethostname(),
            boot.read_text().strip() if boot.exists() else "-",
            os.readlink(namespace) if namespace.is_symlink() else "-",
        )
    )


def _started(pid: int) -> str:
    """Return when a process started: in ticks since the boot, or else by the clock."""
    try:
        # Its name, in brackets, may hold blanks. What follows begins with the third field.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19]
    except (FileNotFoundError, ProcessLookupError):
        pass
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return "ended"
