"""Measure gssf_triton and its peers side by side, on a GPU or a CPU.

    python perf/sweep.py                                  # quick: under two minutes on two CPU cores
    python perf/sweep.py --suite full --resume            # takes an interrupted run up again
    python perf/sweep.py --compare OLD.json               # exit status 1 where something got slower than in that run
    python perf/sweep.py --shape 4096,4096,1024,32        # one shape of your own: M,N,D,B

Writes one JSON a run, by default runs/perf/<device>/<suite>.json, and the plots beside it. What README shows lies in
perf/results: write it with `--no-plots --out perf/results/<device>/<suite>.json`, then let report.py render it.
Exit status: 0, or 1 where something of ours got slower, failed or was wrong, 2 for arguments that don't fit, 130 when
interrupted.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import ROOT, machine, results
from bench.cells import DTYPES, Cell, Shape
from bench.measure import measure
from bench.registry import contender_names, custom_cells, labels, members, suite_cells, suites
from bench.timing import BRIEF, Effort
from gssf_triton import console
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.progress import bar as progress_bar
from gssf_triton.storage import replaceable

#: How often the machine's own ceilings are measured again.
CEILING_INTERVAL_SECONDS = 60.0

#: What a run that goes on must have in common with the one before.
SAME = ("suite", "device", "driver", "cpu", "versions", "settings", "commit")
#: Where a run goes by default.
RUNS = ROOT / "runs/perf"

#: Rounds of a cell: (suite, kind of device).
EFFORTS = {
    ("quick", "cpu"): Effort(least=5, most=60, seconds=0.8),
    ("quick", "cuda"): Effort(least=20, most=200, seconds=0.3),
    ("full", "cpu"): Effort(least=9, most=100, seconds=6.0),
    ("full", "cuda"): Effort(least=20, most=300, seconds=0.5),
}
#: Of the other suites.
USUAL_EFFORT = {"cpu": Effort(least=5, most=60, seconds=2.0), "cuda": Effort(least=20, most=200, seconds=0.5)}


def parse_shape(text: str) -> Shape:
    try:
        parts = text.split(",")
        M, N, D, B = (int(part) for part in parts[:4])
        further = (part.split("=") for part in parts[4:])
        return Shape.of(M, N, D, B, **{name.strip(): int(value) for name, value in further})
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no M,N,D,B: {error}") from error


def parse_contenders(text: str) -> set[str]:
    names = set(text.split(","))
    if unknown := names - set(contender_names()):
        raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(contender_names())}")
    return names


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="perf/sweep.py", description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--suite", choices=suites(), default="quick", help="what to measure (default: quick)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    p.add_argument("--out", type=Path, metavar="JSON", help="the run's file (default: runs/perf/DEVICE/SUITE.json)")
    p.add_argument("--resume", action="store_true", help="keep the cells that the run's file already holds")
    p.add_argument("--compare", type=Path, metavar="OLD.json", help="say what got slower than in OLD beyond noise")
    p.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no cell that would end after this")
    p.add_argument(
        "--shape",
        type=parse_shape,
        action="append",
        metavar="M,N,D,B",
        help="these shapes, not the suite's, of the suite's operations; further sizes by name: 64,100000,256,32,k=10",
    )
    p.add_argument("--dtype", choices=list(DTYPES), action="append", help="with --shape: these dtypes (default: fp32)")
    p.add_argument("--contenders", type=parse_contenders, metavar="A,B", help="of the contenders only these")
    p.add_argument("--seconds", type=float, help="time a cell's samples may take (default: the suite's)")
    p.add_argument(
        "--float32-precision",
        choices=("highest", "high"),
        default="highest",
        help="high allows TF32 (default: highest)",
    )
    p.add_argument("--small", action="store_true", help="a CPU's cells, a sample each: to see that it runs")
    p.add_argument("--no-plots", action="store_true", help="write the JSON only")
    return p


def measure_all(
    run: results.Run, out: Path, cells: list[Cell], device: torch.device, effort: Effort, wanted: set[str] | None,
    deadline: float,
) -> None:  # fmt: skip
    """Every cell that the run lacks, least work first, the file rewritten after each."""
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))

    def raise_ceilings() -> None:
        found = machine.ceilings(device, dtypes, effort.seconds, small=effort == BRIEF)
        run["ceilings"] = machine.higher(run["ceilings"], found)

    run["planned"] = [cell.key for cell in cells]
    missing = [cell for cell in cells if cell.key not in run["cells"]]
    if missing:
        raise_ceilings()
        results.write(out, run)
    last, raised = 0.0, time.monotonic()
    with progress_bar(total=len(cells), initial=len(cells) - len(missing), unit="cell", dynamic_ncols=True) as bar:
        for cell in missing:
            start = time.monotonic()
            # Cells come in order of work: the next one takes as long as the last one at least.
            if start + last > deadline:
                bar.write(f"time limit: {len(cells) - bar.n} of {len(cells)} cells left; --resume measures them")
                break
            bar.set_postfix_str(f"{cell.mode} {cell.dtype} {cell.shape}")
            run["cells"][cell.key] = measure(cell, device, effort, run["seed"], wanted)
            results.write(out, run)
            last = time.monotonic() - start
            bar.update()
            if time.monotonic() - raised > CEILING_INTERVAL_SECONDS:
                raise_ceilings()
                raised = time.monotonic()
    run["complete"] = all(key in run["cells"] for key in run["planned"])
    if missing:
        # Before, between and after: a machine that was busy, or cold, at one of them was slower than it can be.
        raise_ceilings()
        run["finished"] = results.now()
    results.write(out, run)


def summary(run: results.Run) -> str:
    """Time relative to the baseline, a line a cell."""
    lines = []
    for key, cell in run["cells"].items():
        names = labels(cell["operation"])
        lines.append(key)
        for name, entry in cell["contenders"].items():
            if entry["status"] != "ok":
                lines.append(f"    {names[name]:28} {entry['status']}: {entry['reason']}")
            elif "relative" in entry:
                ratio = entry["relative"]
                time_text = ""
                if run["device"]["type"] == "cuda":
                    seconds = entry["seconds"]["median"]
                    time_text = f"  {seconds * 1e3:9.3f} ms {cell['count'] / seconds:9.3g} {cell['unit']}/s"
                    if "host_seconds" in entry:  # runs of before have none
                        mark = "!" if entry["host_exposed"] else ""
                        time_text += f"  host {entry['host_seconds']['median'] * 1e6:7.0f} µs{mark}"
                spread = f"{ratio['median']:6.3f} × baseline [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"
                peak = f"{entry['peak_bytes'] / 2**20:9.1f} MiB"
                lines.append(f"    {names[name]:28} {spread}{time_text}{peak}  n={ratio['n']}")
            elif "seconds" in entry:
                peak = f"{entry['peak_bytes'] / 2**20:9.1f} MiB"
                lines.append(f"    {names[name]:28} {entry['seconds']['median']:9.3g} s, once {peak}")
    return "\n".join(lines)


def failures(run: results.Run) -> list[str]:
    """What of ours has no time, and why."""
    return [
        f"{key} {name}: {entry['status']} ({entry['reason']})"
        for key, cell in run["cells"].items()
        for name, entry in cell["contenders"].items()
        if entry["ours"] and entry["status"] != "ok"
    ]


def main(argv: list[str] | None = None) -> int:
    console.ready()
    p = parser()
    args = p.parse_args(argv)
    started = time.monotonic()
    device = machine.device_named(args.device, p)
    if args.dtype and not args.shape:
        p.error("--dtype goes with --shape; a suite has dtypes of its own")
    torch.set_float32_matmul_precision(args.float32_precision)
    base = BRIEF if args.small else EFFORTS.get((args.suite, device.type), USUAL_EFFORT[device.type])
    effort = base if args.seconds is None else replace(base, seconds=args.seconds)
    suite = "custom" if args.shape else args.suite
    try:
        if args.shape:
            cells = custom_cells(members(args.suite), args.shape, args.dtype or ["fp32"])
        else:
            cells = suite_cells(args.suite, "cpu" if args.small else device.type)
    except ValueError as error:
        p.error(f"--shape: {error}")
    settings = {
        "float32_precision": args.float32_precision,
        "least_samples": effort.least,
        "most_samples": effort.most,
        "seconds_a_cell": effort.seconds,
        "contenders": sorted(args.contenders) if args.contenders else None,
    }
    run = results.new(
        suite, device, finished=None, load_at_start=machine.load(), complete=False, settings=settings,
        seed=random.SystemRandom().randrange(2**31), planned=[], ceilings=None, cells={},
    )  # fmt: skip
    out = args.out or RUNS / run["device"]["slug"] / f"{suite}.json"
    try:
        check_output("--out", out, args.compare)
        if not replaceable(out):
            raise ValueError(f"--out: {out} is no file, which is rewritten after each cell")
        old = results.read(args.compare) if args.compare else None
        if args.resume and out.exists():
            held = results.read(out)
            then, now = ({**r, "commit": r["commit"]["hash"]} for r in (held, run))
            if reasons := results.differences(then, now, SAME):
                p.error(f"--resume: {out} is another run:\n  " + "\n  ".join(reasons))
            run = held
    except (OSError, ValueError, UsageError) as error:
        p.error(str(error))
    busy = run["load_at_start"]
    if device.type == "cpu" and busy is not None and busy > 0.5 * (cores := run["cpu"]["cores"]):
        print(f"note: a load of {busy} on {cores} cores; expect wide quartiles", file=sys.stderr)
    deadline = started + args.time_limit if args.time_limit else float("inf")
    # A polite kill ends as Ctrl-C does; an impolite one loses the cell it met and no other.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure_all(run, out, cells, device, effort, args.contenders, deadline)
    except KeyboardInterrupt:
        print(f"interrupted; {len(run['cells'])} cells are in {out}, --resume goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(summary(run))
    print(f"{out}: {len(run['cells'])} cells")
    if not args.no_plots:
        try:
            for path in results.draw(run, out):
                print(path)
        except OSError as error:
            print(f"no plots: {error}", file=sys.stderr)
    status = 0
    for line in failures(run):
        print(f"FAILED  {line}")
        status = 1
    if old is not None:
        try:
            slower, compared = results.compare(old, run)
        except ValueError as error:
            p.error(str(error))
        for line in slower:
            print(f"SLOWER  {line}")
        print(f"{compared} measurements compared with {args.compare}, {len(slower)} got slower beyond noise")
        status = 1 if slower else status
    return status


if __name__ == "__main__":
    sys.exit(main())
