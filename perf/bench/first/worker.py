"""A process of first_run.py: it does the tasks that come in on stdin, one a line, and prints what it finds.

A line that begins with `MARK` is a message; everything else that it or its libraries print is for the log. It ends
when the program that started it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any

#: Of a message.
MARK = "@first "
#: Lines of a traceback that are kept.
TRACEBACK_LINES = 12


def say(**message: Any) -> None:
    """One message, on a line of its own whatever was printed before."""
    sys.stdout.flush()
    sys.stdout.write(f"\n{MARK}{json.dumps(message)}\n")
    sys.stdout.flush()


def _listen(tasks: queue.Queue[dict[str, Any]]) -> None:
    """Take tasks in until stdin is closed; then end, with all that was started."""
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(waiting,), daemon=True).start()
    began = time.perf_counter()
    from bench.first import tasks  # here, where an error of what it imports reaches the log

    say(ready=round(time.perf_counter() - began, 2))
    while True:
        task = waiting.get()
        started = time.perf_counter()
        try:
            for row in tasks.run(task):
                say(row=row)
        except Exception as error:
            lines = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
            facts = getattr(error, "facts", {})
            say(row={"name": task["name"], "ok": False, "failure": {"traceback": lines, **facts}})
        say(end=task["name"], seconds=round(time.perf_counter() - started, 2), healthy=tasks.is_healthy())


if __name__ == "__main__":
    argparse.ArgumentParser(prog="perf/bench/first/worker.py", description="A process of first_run.py's.").parse_args()
    main()
