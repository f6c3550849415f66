"""Cases until told to stop: run, count, write down what fails, report."""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from support.poison import poisoned_memory

from fuzz.cases import FAMILIES, case
from gssf_triton import console, progress

RUNS = Path("runs/fuzz")


@dataclass(frozen=True)
class Result:
    """What became of one case; `error` is empty where it passed."""

    seed: int
    function: str
    backend: str = "?"
    tags: frozenset[str] = frozenset()
    error: str = ""

    @property
    def command(self) -> str:
        return f"python tests/fuzz --case {self.seed} --function {self.function}"


def run_case(seed: int, function: str | None = None) -> Result:
    """Draw a case and run it, in memory that holds NaN where nobody wrote."""
    function = function or list(FAMILIES)[seed % len(FAMILIES)]
    drawn = None
    try:
        with poisoned_memory():
            drawn = case(seed, function)
            drawn.run()
        error = ""
    except Exception as fault:
        # Broken promises say what they are; anything else is a fault of the package or of the fuzzer: say where.
        error = str(fault) if isinstance(fault, AssertionError) else traceback.format_exc(limit=-6)
        error = error or traceback.format_exc(limit=-3)
    if drawn is None:
        return Result(seed, function, error=error)
    return Result(seed, function, drawn.backend, frozenset(drawn.tags), error)


@dataclass
class Report:
    """Counts of what ran, and the failures."""

    started: float = field(default_factory=time.monotonic)
    cases: Counter[tuple[str, str]] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    failures: list[Result] = field(default_factory=list)

    def add(self, result: Result, folder: Path) -> None:
        self.cases[result.function, result.backend] += 1
        self.tags.update(result.tags)
        if result.error:
            self.failures.append(result)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "failures.txt").open("a", encoding="utf-8") as file:
                file.write(f"{result.command}\n{result.backend}: {', '.join(sorted(result.tags))}\n{result.error}\n\n")

    def text(self) -> str:
        """By function and backend, by feature, and how to repeat each failure."""
        total, seconds = sum(self.cases.values()), time.monotonic() - self.started
        lines = [
            f"{total} cases in {seconds:.0f} s, {len(self.failures)} failed",
            "",
            "function, cases on torch + triton",
        ]
        for name in FAMILIES:
            lines.append(f"  {name:24} {self.cases[name, 'torch']:7} + {self.cases[name, 'triton']}")
        lines += ["", "feature, cases"]
        lines += [f"  {tag:24} {count:7}" for tag, count in sorted(self.tags.items())]
        if self.failures:
            lines += ["", "failed:"] + [f"  {result.command}" for result in self.failures]
        return "\n".join(lines)


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C is the parent's, which stops handing out cases.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _results(seeds: Iterable[int], function: str | None, jobs: int) -> Iterator[Result]:
    if jobs == 1:
        for seed in seeds:
            yield run_case(seed, function)
        return
    waiting = iter(seeds)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker) as pool:
        running: dict[Future[Result], int] = {}
        try:
            while True:
                for seed in itertools.islice(waiting, 2 * jobs - len(running)):
                    running[pool.submit(run_case, seed, function)] = seed
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    seed = running.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        lost = sorted((seed, *running.values()))
                        name = function or list(FAMILIES)[seed % len(FAMILIES)]
                        yield Result(seed, name, error=f"a worker process died; one of the cases {lost} ended it")
                        return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--case", type=int, help="run this one case, and show its traceback")
    parser.add_argument("--function", choices=list(FAMILIES), help="cases of this function only")
    parser.add_argument("--start", type=int, help="the first case; a random one where not given")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--out", type=Path, default=RUNS, help="where failures.txt and report.txt go")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run as the command line says; 1 where a case failed."""
    console.ready()
    options = arguments(argv)
    torch.set_num_threads(1)
    if options.case is not None:
        with poisoned_memory():
            drawn = case(options.case, options.function)
            print(f"{drawn.function} on {drawn.backend}: {', '.join(sorted(drawn.tags))}")
            drawn.run()
        print("passed")
        return 0
    start = random.SystemRandom().randrange(2**31) if options.start is None else options.start
    seeds = itertools.count(start) if options.cases is None else range(start, start + options.cases)
    report = Report()
    print(f"from case {start} on; Ctrl-C ends the run with its report")
    results = _results(seeds, options.function, options.jobs)
    try:
        for result in (bar := progress.bar(results, total=options.cases, unit=" cases", smoothing=0)):
            report.add(result, options.out)
            if result.error:
                bar.write(f"{result.command}\n    {result.error.splitlines()[0 if len(result.error) < 400 else -1]}")
                bar.set_postfix_str(f"failed={len(report.failures)}")
            if options.minutes is not None and time.monotonic() - report.started > 60 * options.minutes:
                break
    except KeyboardInterrupt:
        pass
    results.close()
    print(report.text())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.txt").write_text(report.text() + "\n", encoding="utf-8")
    return 1 if report.failures else 0
