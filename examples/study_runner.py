"""One study's command line: its columns times its seeds. Each finished run is stored at once and not repeated."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from study_data import Source
from study_report import markdown, plot
from study_trainer import Column, Settings, Task, is_of_metric, train
from tqdm import tqdm

import gssf_triton
from gssf_triton import console
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.data import DataError
from gssf_triton.storage import json_rows, read_json, replacing, unusable

#: VSE++ and SCAN on Flickr30K: 30 epochs of 145,000 captions in batches of 128, margin 0.2, one epoch of all negatives.
VSE_RECIPE = Settings(
    steps=34_000, dim=1024, width=32, learning_rate=2e-4, all_negatives=1 / 30, evaluations=30, loss="triplet"
)


#: A slower and a faster metric; a decay towards the cosine (Adam's steps have the learning rate's size, so a pull of 10
#: keeps a weight within about 1/10 of its start); a noisy start; normalisation after the fold.
REMEDIES = ("metric_rate=0.1", "metric_rate=3", "metric_pull=10", "metric_start=0.05", "normalize_after=True")


def shared_towers(source: Source, settings: Settings) -> Settings:
    """The settings of towers trained before the columns: `settings`, or the recipe of the real data sets."""
    if source.data != "glyphs":
        recipe = VSE_RECIPE
        settings = replace(recipe, dim=settings.dim, width=settings.width, loss=settings.loss, evaluations=1)
    return replace(settings, steps=source.tower_steps or settings.steps)


#: The learning rates tried, as multiples of the study's, and the seeds, which no other table uses. All columns take the
#: rate with the best mean over all columns: two seeds cannot separate one column's best from its neighbour.
RATES = (0.5, 1.0, 2.0)
DEVELOPMENT_SEEDS = range(100, 102)


@dataclass(frozen=True)
class Study:
    """What one file of the studies defines.

    Attributes:
        name: Name of its result file.
        title: Title of its table and plot.
        headline: The number that columns are compared by.
        headline_title: What that is, with its unit.
        shown: The numbers in its table.
        data: Data sets it takes.
        settings: The default budget, the same for every column.
        recipe: The default for the real data sets, if it differs.
        columns: The default columns; the first is what others are compared with.
        make: (settings, column, seed, source) to a task.
        seeds: How many seeds by default.
        held_out: How many of the glyphs' names are for the test.
        remedies: Changes of its last column to try if that column does not help.
        causes: Columns that test why, each against the first of them.
        objective: The name of its loss, if it is not the settings'.
    """

    name: str
    title: str
    headline: str
    headline_title: str
    shown: tuple[str, ...]
    data: tuple[str, ...]
    settings: Settings
    columns: tuple[str, ...]
    make: Callable[[Settings, Column, int, Source], Task]
    seeds: int = 5
    held_out: int = 1000
    recipe: Settings | None = None
    remedies: tuple[str, ...] = REMEDIES
    causes: tuple[str, ...] = ()
    objective: str = ""

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Its parts by name: columns that are run and tested together."""
        last = self.columns[-1]
        parts = {
            "columns": self.columns,
            "tuning": tuple(column for c in self.columns for column in self.candidates(c)),
            "remedies": (self.columns[0], last, *(f"{last}:{change}" for change in self.remedies)),
        }
        return parts | ({"causes": self.causes} if self.causes else {})

    def candidates(self, column: str) -> dict[str, float]:
        """A column at every learning rate tried: the columns, and the rate of each."""
        rates = [float(f"{self.settings.learning_rate * rate:g}") for rate in RATES]
        return {f"{column}:learning_rate={rate:g}": rate for rate in rates}

    def defaults(self, data: str) -> Settings:
        """The settings that the command line starts from."""
        return self.settings if data == "glyphs" or self.recipe is None else self.recipe


#: The fields of a run's result that are read again.
RUN = {"column", "seed", "final", "history"}


@dataclass
class Results:
    """A study's result file: its settings, and the runs finished so far."""

    path: Path
    header: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> Results:
        """Continue `path`, if it has runs of the same settings and data.

        Raises:
            ValueError: it has runs of others.
        """
        if not path.exists():
            return cls(path, header)
        decided = ("settings", "data", "held_out", "limit", "tower_steps")
        found = read_json(path, "a study's results", (*decided, "runs"))
        runs = found["runs"]
        if not isinstance(runs, list) or not all(isinstance(run, dict) and run.keys() >= RUN for run in runs):
            raise unusable(path, f"a study's results, each of its runs with {', '.join(sorted(RUN))}", "others")
        if not isinstance(found["settings"], dict):
            raise unusable(
                path, "a study's results with its settings", f"a {type(found['settings']).__name__} for them"
            )
        # A setting that the file lacks was added later: the file's runs used its default.
        found["settings"] = asdict(Settings()) | found["settings"]
        for key in decided:
            if found[key] != header[key]:
                raise ValueError(
                    f"{path} holds runs with other {key} ({found[key]}): choose another --out, or start over with "
                    "--fresh"
                )
        return cls(path, header, runs)

    def done(self, column: str, seed: int) -> bool:
        return any(run["column"] == column and run["seed"] == seed for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        with replacing(self.path) as file:
            file.write((json_rows(self.content()) + "\n").encode())

    def content(self) -> dict[str, Any]:
        return self.header | {"runs": self.runs}


def arguments(study: Study, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=study.title, add_help=False)
    parser.add_argument("--data", default="glyphs", choices=study.data, help="data set (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="its folder; the glyphs need none")
    parser.add_argument("--seeds", type=int, default=study.seeds, help="how many seeds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=study.held_out, help="glyphs: test names (%(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="glyphs: use only so many names (0: all)")
    parser.add_argument("--tower-steps", type=int, default=0, help="steps of shared towers (0: the study's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over: forget this study's runs in --out")
    data = parser.parse_known_args(argv)[0].data
    parser.add_argument("--columns", nargs="+", default=list(study.columns), help=f"default: {' '.join(study.columns)}")
    for setting in fields(Settings):
        default = getattr(study.defaults(data), setting.name)
        flag = f"--{setting.name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", default=default)
        else:
            parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    args = parser.parse_args(argv)
    if (args.data == "glyphs") == (args.root is not None):
        parser.error("--root goes with --data other than glyphs, and only with it")
    for name in ("seeds", "steps", "batch_size", "dim", "width"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    try:
        for ending in (".json", ".png"):
            check_output("--out", results_file(study, args).with_suffix(ending))
    except UsageError as fault:
        parser.error(str(fault))
    return args


def results_file(study: Study, args: argparse.Namespace) -> Path:
    name = study.name if args.data == "glyphs" else f"{study.name}-{args.data}"
    return Path(args.out / f"{name}.json")


def run_one(
    study: Study, settings: Settings, column: Column, seed: int, source: Source, device: torch.device,
    bar: tqdm[Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train one column with one seed and return its numbers."""
    settings = column.settings(settings)
    started = time.monotonic()
    task = study.make(settings, column, seed, source).to(device)
    identity = {"study": study.name, "data": source.data, "column": str(column), "seed": seed} | asdict(settings)
    checkpoint = source.cache / "checkpoints" / f"{study.name}-{source.data}-{column}-{seed}.pt".replace(":", "+")
    history: list[dict[str, float]] = []
    for reached in train(task, identity, checkpoint):
        history = reached
        if bar is not None:
            bar.update()
    checkpoint.unlink(missing_ok=True)
    learned = {
        name: {"mean": p.mean().item(), "std": p.std().item() if p.numel() > 1 else 0.0}
        for name, p in task.named_parameters()
        if is_of_metric(name)
    }
    return {
        "column": str(column), "seed": seed, "final": history[-1], "history": history, "learned": learned,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def header(study: Study, settings: Settings, source: Source, device: torch.device) -> dict[str, Any]:
    return {
        "study": study.name, "title": study.title, "headline": study.headline, "headline_title": study.headline_title,
        "shown": list(study.shown), "data": source.data, "held_out": source.held_out, "limit": source.limit,
        "tower_steps": source.tower_steps,
        "settings": asdict(settings), "device": str(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gssf": gssf_triton.__version__},
    }  # fmt: skip


def run_study(study: Study, args: argparse.Namespace) -> Results:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(chosen)
    settings = replace(study.settings, **{s.name: getattr(args, s.name) for s in fields(Settings)})
    source = Source(args.data, args.root, args.out, args.held_out, args.limit, args.tower_steps)
    path = results_file(study, args)
    if args.fresh:
        path.unlink(missing_ok=True)
        for folder in ("checkpoints", "towers"):
            shutil.rmtree(args.out / folder, ignore_errors=True)
    columns = [Column.parse(text) for text in args.columns]
    results = Results.open(path, header(study, settings, source, device))
    wanted = [(c, seed) for seed in range(args.seed, args.seed + args.seeds) for c in columns]
    waiting = [(c, seed) for c, seed in wanted if not results.done(str(c), seed)]
    total = sum(column.settings(settings).steps for column, _ in waiting)
    with tqdm(total=total, unit="step", smoothing=0.05) as bar:
        for column, seed in waiting:
            bar.set_description(f"{study.name}: {column}, seed {seed}")
            results.add(run_one(study, settings, column, seed, source, device, bar))
    return results


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    console.ready()
    args = arguments(study, argv)
    try:
        results = run_study(study, args)
    except (ValueError, DataError, FileNotFoundError) as fault:
        print(f"study_{study.name}: {fault}", file=sys.stderr)
        return 2
    print(f"\n{markdown(results.content())}")
    picture = results.path.with_suffix(".png")
    plot(results.content(), picture)
    print(f"\nwritten to {results.path} and {picture}")
    return 0
