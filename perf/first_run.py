"""The first five minutes on a GPU: which kernels are right, how fast each is, and what whole calls take.

    python perf/first_run.py --out FOLDER
    python perf/first_run.py --out FOLDER --resume OLD/first_run.json      # the stages that one did not finish
    python perf/first_run.py --out FOLDER --assembler PATH                 # Triton's kernels by another ptxas

Nothing is installed, and nothing is kept but FOLDER: caches are new and lie in a temporary folder. FOLDER holds
`first_run.json`, rewritten after each row, `first_run.log`, `table.txt` and `failures.txt`. The stages have their
seconds each (`STAGES`); what one leaves, the next may use. Calls run in processes of their own: one that dies or hangs
is reported, run again with CUDA_LAUNCH_BLOCKING=1 where it died, and the others go on. This program itself imports
nothing that may be missing or broken. In a copy without git GSSF_COMMIT names the commit.
Exit status: 0, or 1 where something failed, 2 for arguments that don't fit, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from datetime import datetime, timezone
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.dont_write_bytecode = True  # nothing is written outside of --out and a temporary folder

from bench import checkout
from bench.first.report import failed, failures_text, table
from bench.first.worker import TRACEBACK_LINES
from bench.processes import DIED, DONE, Pool, Row, Task, Worker

SCHEMA = 1
#: What --out holds at the end.
FILES = ("first_run.json", "first_run.log", "table.txt", "failures.txt")
#: Stage → its seconds, and its processes: what is timed has the device for itself.
STAGES: dict[str, tuple[float, int]] = {
    "environment": (20, 1),
    "ceilings": (15, 1),
    "compile": (45, 14),
    "smoke": (50, 6),
    "headline": (55, 1),
    "tiles": (40, 1),
    "calls": (50, 1),
    "repeat": (20, 1),
}
#: Processes that wait for tasks from the start on.
PROCESSES = max(count for _, count in STAGES.values())
#: Seconds in all, and of one task: a kernel that hangs must not cost a stage.
BUDGET, TASK_SECONDS = 300.0, 25.0
#: What a run that goes on must have in common with the one before.
SAME = ("device", "versions", "commit", "source", "small", "assembler")


class Run:
    """The results so far, and their file."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.found: dict[str, Any] = {
            "schema": SCHEMA, "program": "first_run", "started": started, **facts, "stages": {},
        }  # fmt: skip

    def write(self) -> None:
        """Replace the file in one step: after a kill it holds the last row, never half a file."""
        with self.lock:
            self._replace("first_run.json", json.dumps(self.found))

    def _replace(self, name: str, content: str) -> None:
        path = Path(os.path.realpath(self.folder / name))  # a link stays one
        scratch = path.with_name(f".{path.name}")
        scratch.write_text(content + "\n", encoding="utf-8", errors="backslashreplace")
        os.replace(scratch, path)

    def begin(self, stage: str) -> None:
        with self.lock:
            self.found["stages"][stage] = {"status": "begun", "seconds": None, "rows": {}}

    def row(self, stage: str, row: Row) -> None:
        """Add a row, or to the row of that name."""
        with self.lock:
            rows = self.found["stages"][stage]["rows"]
            rows[row["name"]] = rows.get(row["name"], {}) | row
            self.write()

    def end(self, stage: str, status: str, seconds: float) -> None:
        with self.lock:
            self.found["stages"][stage] |= {"status": status, "seconds": round(seconds, 1)}
            self.write()

    def report(self) -> str:
        """Write the table and the failures; the table."""
        text = table(self.found)
        self._replace("table.txt", text)
        self._replace("failures.txt", failures_text(self.found) or "none")
        return text


class Program:
    """The stages, one after the other, each until its time is up; `pace` multiplies their seconds."""

    def __init__(self, run: Run, pool: Pool, common: dict[str, Any], deadline: float, pace: float) -> None:
        self.run, self.pool, self.common, self.deadline, self.pace = run, pool, common, deadline, pace

    def stage(self, name: str, groups: list[list[Task]], until: float) -> None:
        """Do the groups in as many processes as the stage has."""
        seconds, processes = STAGES[name]
        began = time.monotonic()
        self.run.begin(name)
        waiting = deque(groups)
        late: list[str] = []

        def work(_: int) -> None:
            worker: Worker | None = None
            while waiting:
                try:
                    group = waiting.popleft()
                except IndexError:
                    break
                worker = self._group(name, group, until, late, worker)
                if worker is not None and processes == 1:
                    self.pool.give_back(worker, keep=False)
                    worker = None
            if worker is not None:
                self.pool.give_back(worker, keep=True)

        count = min(1 if self.pool.shared else processes, self.pool.most, len(groups))
        with ThreadPool(count) as threads:
            threads.map(work, range(count))
        status = "done" if not late else f"no time left for {len(late)}: {', '.join(late[:3])}"
        self.run.end(name, status, time.monotonic() - began)
        taken = time.monotonic() - began
        print(f"{name}: {status}, {taken:.1f} s of {seconds:.0f}", file=sys.stderr, flush=True)

    def _group(
        self, stage: str, tasks: list[Task], until: float, late: list[str], worker: Worker | None
    ) -> Worker | None:
        """Do tasks in one process, another where it dies; that process, where it still lives."""
        for task in tasks:
            if time.monotonic() >= until:
                late.append(task["name"])
                continue
            worker = worker or self.pool.take()
            outcome = self._do(worker, stage, task, until)
            if outcome == DONE:
                continue
            failure = self._failure(worker, outcome)
            worker = None
            if outcome == DIED and time.monotonic() < until:
                again = self.pool.take(CUDA_LAUNCH_BLOCKING="1")
                told: list[Row] = []
                second = again.do(task | self.common, self._limit(stage, until), told.append)
                failure["blocking"] = self._failure(again, second) | {"rows": told}
            self.run.row(stage, {"name": task["name"], "ok": False, "failure": failure})
        return worker

    def _limit(self, stage: str, until: float) -> float:
        return until if stage == "environment" else min(until, time.monotonic() + TASK_SECONDS * max(1.0, self.pace))

    def _do(self, worker: Worker, stage: str, task: Task, until: float) -> str:
        return worker.do(task | self.common, self._limit(stage, until), lambda row: self.run.row(stage, row))

    def _failure(self, worker: Worker, outcome: str) -> dict[str, Any]:
        """What is known of a process that did not do its task; it is ended."""
        status = worker.end()
        return {"outcome": outcome, "exit_status": status, "last": list(worker.last)[-TRACEBACK_LINES:]}


def run_all(program: Program, held: dict[str, Any] | None, wanted: list[str]) -> None:
    """Every wanted stage that `held` has not finished; the first makes the plan of the others."""
    run, until = program.run, time.monotonic() + STAGES["environment"][0] * program.pace
    # Nothing can be done without it: it has all the time there is.
    program.stage("environment", [[{"kind": "environment", "name": "environment"}]], program.deadline)
    until = max(until, time.monotonic())
    facts = run.found["stages"]["environment"]["rows"].get("environment", {})
    plan = facts.pop("plan", None)
    if plan is None:
        return
    run.found |= facts.pop("facts")
    run.write()
    if held is not None and (other := [name for name in SAME if held.get(name) != run.found.get(name)]):
        print(f"--resume: another {', '.join(other)}; beginning anew", file=sys.stderr)
        held = None
    for name, groups in plan.items():
        until += STAGES[name][0] * program.pace
        if held is not None and held["stages"].get(name, {}).get("status") == "done":
            run.found["stages"][name] = held["stages"][name]
            continue
        if name in wanted:
            program.stage(name, groups, min(until, program.deadline))


def is_done(found: dict[str, Any], wanted: list[str]) -> bool:
    """True where every wanted stage came to its end."""
    return all(found["stages"].get(name, {}).get("status") == "done" for name in wanted)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="perf/first_run.py", description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results go, four files")
    p.add_argument("--device", default="cuda", help="cuda, or cpu in Triton's interpreter (default: %(default)s)")
    p.add_argument(
        "--resume", nargs="?", const="", metavar="JSON",
        help="keep finished stages of FOLDER's, or another, first_run.json",
    )  # fmt: skip
    p.add_argument(
        "--assembler", type=checkout.assembled_with, default={}, metavar="PATH",
        help="the ptxas that Triton's kernels are assembled with",
    )  # fmt: skip
    p.add_argument("--small", action="store_true", help="inputs as small as the interpreter's")
    p.add_argument("--processes", type=int, default=PROCESSES, help="at most so many (default: %(default)d)")
    p.add_argument("--one-process", action="store_true", help="all tasks in one process, as long as it lives")
    stages = list(STAGES)[1:]
    p.add_argument("--only", nargs="+", choices=stages, default=stages, metavar="STAGE", help="these stages")
    p.add_argument(
        "--budget", type=float, default=BUDGET,
        help="seconds in all, from which the stages have theirs (default: %(default)g)",
    )  # fmt: skip
    args = p.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out: {args.out} is no folder to write in ({error.strerror})")
    if not os.access(args.out, os.W_OK | os.X_OK):
        p.error(f"--out: {args.out} cannot be written in")
    for name in FILES:
        if (args.out / name).exists() and not (args.out / name).is_file():
            p.error(f"--out: {args.out / name} is no file")
    return args


def _held(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.resume is None:
        return None
    path = Path(args.resume or args.out / "first_run.json")
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        held = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        print(f"--resume: {path} cannot be used ({error}); beginning anew", file=sys.stderr)
        return None
    return held if isinstance(held, dict) and held.get("schema") == SCHEMA and "stages" in held else None


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the console's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    args = arguments(argv)
    deadline = time.monotonic() + args.budget
    held = _held(args)
    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        folder = Path(tempfile.mkdtemp(prefix="gssf-first-run-"))
    except OSError as error:
        print(f"perf/first_run.py: {error}", file=sys.stderr)
        return 2
    run = Run(args.out, {"source": checkout.source_digest(), "small": args.small, "budget": args.budget})
    status = 1
    try:
        with (args.out / "first_run.log").open("a", encoding="utf-8") as log:
            environment = checkout.environment(folder) | checkout.REPEATABLE | args.assembler
            pool = Pool(environment, log, args.processes, shared=args.one_process)
            common = {"device": args.device, "small": args.small}
            program = Program(run, pool, common, deadline, args.budget / BUDGET)
            try:
                pool.start()
                run_all(program, held, args.only)
            finally:
                pool.end()
        status = int(bool(failed(run.found)) or not is_done(run.found, args.only))
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        status = 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        run.write()
        print(run.report())
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status


if __name__ == "__main__":
    sys.exit(main())
