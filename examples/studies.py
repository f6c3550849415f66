"""All studies, one after another, and the tables and plots made from what they stored.

    python examples/studies.py                     # run them all into runs/studies, or resume an interrupted run
    python examples/studies.py --only frozen reid --seeds 3
    python examples/studies.py --part tuning       # every column at several learning rates, on separate seeds
    python examples/studies.py --part remedies     # each study's last column with other starts, rates and pulls
    python examples/studies.py --part causes       # tests of why a study finds no difference
    python examples/studies.py --publish           # copy runs/studies to examples/results, redraw the tables
    python examples/studies.py --tables            # redraw the tables from examples/results

Other arguments go to every study: see `python examples/study_frozen.py --help`.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study_runner
from study_report import compare, markdown, plot, rates_table, replace_between, summary
from study_runner import DEVELOPMENT_SEEDS, Study

from gssf_triton import console
from gssf_triton.storage import read_json

STUDIES = ("image_text", "regions", "reid", "fine_grained", "distillation", "frozen", "attention")
#: The parts of a study besides its columns, by the title of their tables.
OTHER_PARTS = {
    "tuning": f"By learning rate, on seeds {' and '.join(map(str, DEVELOPMENT_SEEDS))}; all columns take the best mean",
    "remedies": "Remedies tried",
    "causes": "Why",
}
PARTS = ("columns", *OTHER_PARTS)
HERE = Path(__file__).parent
RESULTS = HERE / "results"
README, COOKBOOK = HERE.parent / "README.md", HERE / "README.md"


#: The fields of a result file that the tables need.
RESULT = ("title", "headline", "headline_title", "shown", "runs")


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path, "a study's results", RESULT) if path.exists() else None


#: Results with fewer seeds in any column are not published.
FEWEST_SEEDS = 5


def study_of(name: str) -> Study:
    """The study of a name, from its own file."""
    found: Study = importlib.import_module(f"study_{name}").STUDY
    return found


def stored(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The result files of the studies that have one, in the studies' order."""
    return [results for name in STUDIES if (results := _read(folder / f"{name}.json"))]


def complete(results: dict[str, Any], columns: Sequence[str], fewest: int = FEWEST_SEEDS) -> bool:
    """Whether every column has seeds enough."""
    seeds = {c.column: len(c.values) for c in compare(results)}
    return all(seeds.get(column, 0) >= fewest for column in columns)


def tuned(name: str, results: dict[str, Any]) -> dict[str, dict[float, float]]:
    """A study's tuning: column → learning rate → headline number, the mean over the development seeds."""
    means = {c.column: c.mean for c in compare(results)}
    study = study_of(name)
    return {c: {rate: means[text] for text, rate in study.candidates(c).items()} for c in study.columns}


def folder_of(part: str, root: Path) -> Path:
    """The folder of a part's results."""
    return root if part == "columns" else root / part


def missing(results: list[dict[str, Any]]) -> str:
    """A sentence about the studies without a result, or an empty text."""
    found = {study["study"] for study in results}
    names = [f"`study_{name}.py`" for name in STUDIES if name not in found]
    return f"\n\nNot run to {FEWEST_SEEDS} seeds yet, so not shown: {', '.join(names)}." if names else ""


def details(results: list[dict[str, Any]]) -> str:
    """Every study's own table under its title, with its plot."""
    parts = []
    for study in results:
        settings = study["settings"]
        objective = study_of(study["study"]).objective or settings["loss"]
        budget = (
            f"{settings['steps']} steps of {settings['batch_size']}, D = {settings['dim']}, {objective}; "
            f"`study_{study['study']}.py`, `results/{study['study']}.json`"
        )
        parts.append(f"#### {study['title']}\n\n{markdown(study)}\n\n{budget}.")
        parts.append(f"![{study['title']}: every seed, and the paired differences](results/{study['study']}.png)")
        for part, title in OTHER_PARTS.items():
            further = _read(folder_of(part, RESULTS) / f"{study['study']}.json")
            if further:
                table = rates_table(tuned(study["study"], further)) if part == "tuning" else markdown(further)
                parts.append(f"{title}:\n\n{table}")
    return "\n\n".join(parts) + missing(results)


def tables() -> None:
    """Redraw the tables of both READMEs, where their markers are, and the plots."""
    results = stored()
    for study in results:
        plot(study, RESULTS / f"{study['study']}.png")
    replace_between(README, "studies", summary(results) + missing(results))
    replace_between(COOKBOOK, "studies", details(results))


def publish(out: Path) -> None:
    """Copy the results with enough seeds in all columns, and redraw the tables."""
    for name in STUDIES:
        for part, columns in study_of(name).parts.items():
            found = folder_of(part, out) / f"{name}.json"
            results = _read(found)
            fewest = len(DEVELOPMENT_SEEDS) if part == "tuning" else FEWEST_SEEDS
            if results and complete(results, columns, fewest):
                folder_of(part, RESULTS).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found, folder_of(part, RESULTS) / found.name)
    for name in ("look.json", "look.png"):
        if (out / name).exists():
            shutil.copyfile(out / name, RESULTS / name)
    tables()


def main(argv: Sequence[str] | None = None) -> int:
    console.ready()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=STUDIES, help="which studies (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, default="columns", help="what to run")
    parser.add_argument("--publish", action="store_true", help="take the results in --out over into examples/results")
    parser.add_argument("--tables", action="store_true", help="redraw the tables from examples/results")
    args, others = parser.parse_known_args(argv)
    if args.publish or args.tables:
        publish(args.out) if args.publish else tables()
        return 0
    for name in args.only:
        study = study_of(name)
        if args.part not in study.parts:
            continue
        given = ["--out", str(folder_of(args.part, args.out)), "--columns", *study.parts[args.part]]
        if args.part == "tuning":
            given += ["--seed", str(DEVELOPMENT_SEEDS[0]), "--seeds", str(len(DEVELOPMENT_SEEDS))]
        given += others
        code = study_runner.main(study, given)
        if code:
            return code
    print(f"\n{summary(stored(folder_of(args.part, args.out)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
