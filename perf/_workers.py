"""The processes of first_run.py, seen from outside: started ahead, given tasks, replaced where one dies or hangs."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import _process
from _first_worker import MARK, TRACEBACK_LINES

Task = dict[str, Any]
Row = dict[str, Any]

PROGRAM = Path(__file__).resolve().with_name("_first_worker.py")
#: What a process that prints no more is given to be gone.
ENDING_SECONDS = 2.0
#: How a task came out.
DONE, DIED, LATE = "done", "died", "late"


class Worker:
    """One process. A thread reads what it prints, messages into a queue, the rest into the log and the last lines."""

    def __init__(self, environment: dict[str, str], log: TextIO) -> None:
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.last: deque[str] = deque(maxlen=TRACEBACK_LINES)
        self.log = log
        self.healthy = True
        self.ended = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(PROGRAM)], env=os.environ | environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        _process.RUNNING.add(self.process.pid)
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
        """Have a task done by `until` (`time.monotonic()`); how it came out."""
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
        _process.kill(self.process.pid)
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what nobody reads any more
                    pipe.close()
        return status


class Pool:
    """Workers that wait for tasks: importing torch takes as long as many a measurement.

    Args:
        environment: What they need in theirs.
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
