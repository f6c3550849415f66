"""Processes that are killed or end by themselves, forked from one that has imported everything and has one thread.

torch takes seconds to import, and a process with threads, as pytest's is, must not be forked: so a script of its own
imports what is to run, this file, and forks on demand.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Nursery:
    """Starts processes by rounds: the next round's come when the last one's have ended."""

    script: subprocess.Popen[str]

    def start(self, *words: object) -> list[int]:
        """A process for each word; their ids."""
        assert self.script.stdin is not None
        self.script.stdin.write(" ".join(map(str, words)) + "\n")
        self.script.stdin.flush()
        return self._numbers()

    def end(self) -> list[int]:
        """Wait for the round's processes; the exit status of each, or the negative signal that killed it."""
        return self._numbers()

    def _numbers(self) -> list[int]:
        assert self.script.stdout is not None
        line = self.script.stdout.readline()
        if not line and self.script.stderr is not None:
            raise AssertionError(self.script.stderr.read())
        return [int(word) for word in line.split()]


@contextmanager
def forked(function: str, *arguments: object) -> Iterator[Nursery]:
    """Processes that run `module.function(word, *arguments)`, a word each, all of it text; warnings are errors."""
    command = [sys.executable, "-W", "error", __file__, function, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | ONE_THREAD, text=True, start_new_session=True, **pipes) as script:
        try:
            yield Nursery(script)
            assert script.stdin is not None and script.stderr is not None
            script.stdin.close()
            assert script.wait(60) == 0, script.stderr.read()
        finally:
            # Where a test failed, its processes are still at work.
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)


def main(function: str, *arguments: str) -> None:
    module, _, name = function.partition(".")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    work = getattr(importlib.import_module(f"support.{module}"), name)
    for line in sys.stdin:
        children = []
        for word in line.split():
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    work(word, *arguments)
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        print(*children, flush=True)
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
