"""A process is told from another by more than its id."""

import os
import socket
import subprocess
import sys

import pytest

from tasks import processes


def test_this_process_is_there() -> None:
    assert not processes.is_gone(processes.this_process())


def test_an_ended_process_is_gone() -> None:
    script = "from tasks.processes import this_process\nprint(this_process())"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert processes.is_gone(ended)


def test_a_living_process_is_not_gone_for_another_one() -> None:
    script = "import sys\nfrom tasks.processes import is_gone\nprint(is_gone(sys.argv[1]))"
    seen = subprocess.run(
        [sys.executable, "-c", script, processes.this_process()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("word", "gone"),
    [
        (0, False),  # another machine
        (1, True),  # this one, before it was started anew
        (2, False),  # another container of this machine
        (4, True),  # a process that had the same id before
    ],
)
def test_what_is_known_of_others(word: int, gone: bool) -> None:
    words = processes.this_process().split(" ")
    words[word] = "7"
    assert processes.is_gone(" ".join(words)) is gone


def test_the_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil derives a process's start from the clock, which an NTP step moves."""
    before = processes.this_process()
    monkeypatch.setattr("psutil.Process.create_time", lambda _: 0.0)
    assert not processes.is_gone(before)
    assert str(os.getpid()) in before


@pytest.mark.parametrize(
    "unreadable", ["", "host 12 1699.5", "a b c d e", f"{socket.gethostname()} 12"]
)
def test_what_cannot_be_read_is_not_called_gone(unreadable: str) -> None:
    assert not processes.is_gone(unreadable)


def test_what_an_earlier_release_wrote_is_understood() -> None:
    host = socket.gethostname()
    assert not processes.is_gone(f"{host} {os.getpid()} 1699.5")
    assert processes.is_gone(f"{host} 99999999 1699.5")
