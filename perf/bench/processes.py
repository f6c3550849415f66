"""Programs that this one starts: none outlives its time, or the program that started it.

`output` runs one to its end. A `Pool` holds processes of first_run.py that wait for tasks.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from bench import ROOT
from bench.first.worker import MARK, TRACEBACK_LINES

Task = dict[str, Any]
Row = dict[str, Any]

#: What a program is given to end by itself once it is interrupted, …
GRACE_SECONDS = 10.0
#: … and one that prints no more, to be gone.
ENDING_SECONDS = 2.0
#: How a task ended.
DONE, DIED, LATE = "done", "died", "late"
#: The process groups that were started and not yet killed.
RUNNING: set[int] = set()


def _start(command: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """A program in a process group of its own, its two outputs in one."""
    process = subprocess.Popen(
        command, env=os.environ | environment, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, **options,
    )  # fmt: skip
    RUNNING.add(process.pid)
    return process


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

    A program whose time is up is interrupted, with all that it started, so that it can print what it has. What is still
    running after that is killed: it would share the device with the steps to come.
    """
    process = _start(command, environment, cwd=ROOT)
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


class Worker:
    """A process of first_run.py. A thread queues its messages; other lines go to the log, the last ones are kept."""

    def __init__(self, environment: dict[str, str], log: TextIO) -> None:
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.last: deque[str] = deque(maxlen=TRACEBACK_LINES)
        self.log = log
        self.healthy = True
        self.ended = threading.Event()
        command = [sys.executable, "-u", "-m", "bench.first.worker"]
        # Python finds modules in the current folder first: the user's may hold another `bench`.
        self.process = _start(command, environment, stdin=subprocess.PIPE, cwd=ROOT)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.messages.put(json.loads(line.removeprefix(MARK)))
            elif line.strip():
                self.last.append(line.rstrip())
                self.log.write(f"[{self.process.pid}] {line.rstrip()}\n")
                self.log.flush()
        self.ended.set()
        self.messages.put(None)

    def do(self, task: Task, until: float, on_row: Callable[[Row], None]) -> str:
        """Have a task done by `until` (`time.monotonic()`): DONE, DIED or LATE."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except OSError:
            return DIED
        while True:
            try:
                message = self.messages.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                return LATE
            if message is None:
                return DIED
            if "row" in message:
                on_row(message["row"])
            elif "end" in message:
                self.healthy = message["healthy"]
                return DONE if self.healthy else DIED

    def end(self) -> int | None:
        """Kill it, with all that it started; its exit status if it ended by itself."""
        status = None
        if self.ended.is_set():
            with suppress(subprocess.TimeoutExpired):
                status = self.process.wait(timeout=ENDING_SECONDS)
        kill(self.process.pid)
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # the other end may be closed
                    pipe.close()
        return status


class Pool:
    """Workers that wait for tasks: importing torch takes as long as many a measurement.

    Args:
        environment: Added to the workers' environment.
        log: Where what they print goes.
        most: As many wait from the start on.
        shared: One worker for everything, as long as it lives.
    """

    def __init__(self, environment: dict[str, str], log: TextIO, most: int, *, shared: bool = False) -> None:
        self.environment, self.log, self.most, self.shared = environment, log, most, shared
        self.idle: list[Worker] = []
        self.all: list[Worker] = []
        self.is_open = True
        self.lock = threading.Lock()

    def _new(self, environment: dict[str, str]) -> Worker:
        assert self.is_open, "the program is being ended"
        worker = Worker(self.environment | environment, self.log)
        self.all.append(worker)
        return worker

    def start(self) -> None:
        """Have the workers wait."""
        self.idle += [self._new({}) for _ in range(1 if self.shared else self.most)]

    def take(self, **environment: str) -> Worker:
        """A waiting worker, or a new one; always a new one for another environment."""
        with self.lock:
            if self.idle and not environment:
                return self.idle.pop(0)
            return self._new(environment)

    def give_back(self, worker: Worker, *, keep: bool) -> None:
        """Let a worker wait again, or end it."""
        if (keep or self.shared) and worker.healthy and worker.process.poll() is None:
            with self.lock:
                self.idle.insert(0, worker)
        else:
            worker.end()

    def end(self) -> None:
        """End them all, and start no more."""
        with self.lock:
            self.is_open = False
        for worker in self.all:
            worker.end()
