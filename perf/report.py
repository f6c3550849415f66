"""Render README.md's results from committed runs, so that no figure is ever copied by hand.

    python perf/report.py                            # from every perf/results/*/full.json, else quick.json
    python perf/report.py perf/results/cpu-2core/full.json
    python perf/report.py --check                    # exit status 1 where README.md is not what the runs say

The table goes between the markers `<!-- results:begin -->` and `<!-- results:end -->`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import _results
from _registry import contender_names, labels
from _results import CellRow, Run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def default_runs() -> list[Path]:
    """One run a device: its full suite where there is one."""
    folders = sorted(folder for folder in RESULTS.glob("*") if folder.is_dir())
    candidates = [[folder / "full.json", folder / "quick.json"] for folder in folders]
    return [next(path for path in paths if path.exists()) for paths in candidates if any(p.exists() for p in paths)]


def chosen_cells(run: Run) -> list[CellRow]:
    """For a reader of the README: along M = N at the usual D and B, and the tall galleries."""
    rows: list[CellRow] = []
    for dtype in dict.fromkeys(cell["dtype"] for cell in run["cells"].values()):
        for mode in dict.fromkeys(cell["mode"] for cell in run["cells"].values()):
            cells = [c for c in run["cells"].values() if c["dtype"] == dtype and c["mode"] == mode]
            _, squares = _results.line(cells, "MN")
            tall = [c for c in cells if c["M"] != c["N"]]
            at = {(c["D"], c["B"]) for c in squares}
            rows += squares + ([c for c in tall if (c["D"], c["B"]) in at] or tall[:1])
    return rows


def _time(cell: CellRow, name: str, gpu: bool) -> str:
    entry = cell["contenders"].get(name)
    if entry is None:
        return ""
    if entry["status"] != "ok" or "relative" not in entry:
        return str(entry["status"]) if entry["status"] != "ok" else ""
    ratio = entry["relative"]
    text = f"{ratio['median']:.2f}" if name != cell["baseline"] else "1"
    return f"{text} ({entry['seconds']['median'] * 1e3:.3g} ms)" if gpu else text


def _memory(cell: CellRow) -> str:
    ours, base = cell["contenders"].get("gssf"), cell["contenders"].get(cell["baseline"])
    if not ours or not base or "peak_bytes" not in ours or not base.get("peak_bytes"):
        return ""
    return f"{ours['peak_bytes'] / base['peak_bytes']:.2f}"


def section(run: Run, path: Path, readme: Path) -> str:
    """One device's table and pictures."""
    gpu = run["device"]["type"] == "cuda"
    cells = chosen_cells(run)
    present = {name for cell in cells for name in cell["contenders"]}
    # A CPU's baseline would be a column of ones.
    bases = {cell["baseline"] for cell in cells}
    names = [name for name in contender_names() if name in present and (gpu or name not in bases)]
    shown = labels()
    versions, revision = run["versions"], run["commit"]["hash"]
    build = f"torch {versions['torch']}, Triton {versions['triton']}" if gpu else f"torch {versions['torch']}"
    at = f", commit {revision[:10]}{' with changes' if run['commit']['dirty'] else ''}" if revision else ""
    folder = Path(os.path.relpath(path.parent, readme.parent)).as_posix()
    lines = [
        f"**{_results.device_name(run)}**, {build}{at}: medians of interleaved runs, time relative to cosine's"
        + (", milliseconds in brackets." if gpu else "; the spread is in the JSON."),
        "",
        "| pass | dtype | M × N | D | B | " + " | ".join(shown[n] for n in names) + " | our memory / cosine's |",
        "|" + "---|" * 5 + "--:|" * (len(names) + 1),
    ]
    for cell in cells:
        shape = f"{cell['M']:,} × {cell['N']:,} | {cell['D']} | {cell['B']}"
        times = " | ".join(_time(cell, name, gpu) for name in names)
        lines.append(f"| {cell['mode']} | {cell['dtype']} | {shape} | {times} | {_memory(cell)} |")
    lines += ["", f"Every shape and sample: [{path.name}]({folder}/{path.name})."]
    pictures = sorted(p for p in path.parent.glob(f"{path.stem}-*.png") if "-memory-" not in p.name)
    lines += [f"\n![{picture.stem.replace('-', ' ')}]({folder}/{picture.name})" for picture in pictures]
    return "\n".join(lines)


def render(text: str, runs: list[Path], readme: Path) -> str:
    """`text` with the part between the markers made anew.

    Raises:
        ValueError: the markers are missing, double or out of order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} needs one {BEGIN} and after it one {END}")
    sections = [section(_results.read(path), path.resolve(), readme) for path in runs]
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return head + BEGIN + "\n" + "\n\n".join(sections) + "\n" + END + tail


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="perf/report.py", description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("runs", nargs="*", type=Path, help="runs to show (default: one a folder of perf/results)")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md")
    p.add_argument("--check", action="store_true", help="write nothing; exit status 1 where it would change something")
    args = p.parse_args(argv)
    readme = args.readme.resolve()
    try:
        before = readme.read_text(encoding="utf-8")
        after = render(before, args.runs or default_runs(), readme)
    except (OSError, ValueError) as error:
        p.error(str(error))
    if args.check:
        if before != after:
            print(f"{readme} is not what the runs say: python perf/report.py renders it", file=sys.stderr)
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
