"""Programs started beside this one: none outlives its time, or whoever started it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: What a program is given to end by itself once it is interrupted.
GRACE_SECONDS = 10.0
#: The process groups that were started and not yet killed.
RUNNING: set[int] = set()


def kill(group: int) -> None:
    """End a process group at once."""
    RUNNING.discard(group)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def kill_all() -> None:
    """End every group that still runs."""
    for group in list(RUNNING):
        kill(group)


def output(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None where the time was up, and what was printed.

    A program whose time is up is interrupted, with all that it started, so that it can say what it knows; what is still
    there after that would share the device with the steps to come, and is killed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    RUNNING.add(process.pid)
    done = None
    try:
        printed, _ = process.communicate(timeout=None if math.isinf(seconds) else max(1.0, seconds))
        done = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            printed, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            kill(process.pid)
            printed, _ = process.communicate()
    finally:
        kill(process.pid)
    return done, printed


def tail(printed: str, lines: int = 5) -> list[str]:
    """The last lines."""
    return printed.splitlines()[-lines:]
