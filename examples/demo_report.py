"""Render README.md's demo table from a run's committed results, so that no figure is copied by hand.

make demo && cp runs/demo/{results.json,retrieval_sheet.png,learning_curve.png} examples/figures/
python examples/demo_report.py            # writes the table between <!-- demo:begin --> and <!-- demo:end -->
python examples/demo_report.py --check    # exit status 1 if README.md does not match the results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from glyph_retrieval import describe_runs

from gssf_triton import console
from gssf_triton.storage import read_json, reason, unusable

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path(__file__).resolve().parent / "figures"


def between(text: str, name: str, body: str) -> str:
    """`text` with the part between the markers `name:begin` and `name:end` replaced.

    Raises:
        ValueError: the markers are missing or out of order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README.md needs one {begin} and after it one {end}")
    return f"{head}{begin}\n{body}\n{end}{tail}"


def demo_section(path: Path) -> str:
    """The measured table and its settings."""
    fields = ("settings", "versions", "test_names", "train_images", "train_names", "runs")
    results = read_json(path, "a demo's results", fields)
    try:
        settings, versions = results["settings"], results["versions"]
        said = (
            f"R@K in percent on {results['test_names']:,} names never seen in training, one glyph each, after "
            f"{settings['steps']} steps of {settings['batch_size']} pairs ({settings['loss']}, D = {settings['dim']}, "
            f"B = {settings['block_size']}; {results['train_images']:,} glyphs of {results['train_names']:,} names; "
            f"torch {versions['torch']}):"
        )
        table = describe_runs(results["runs"])
    # Deeper than `fields` checks.
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise unusable(path, "a demo's results", f"others ({reason(fault)})") from fault
    picture = "![rsum as training goes on](examples/figures/learning_curve.png)"
    return f"{said}\n\n{table}\n\n{picture}"


def main(argv: list[str] | None = None) -> int:
    console.ready()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where it would")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = between(before, "demo", demo_section(FIGURES / "results.json"))
    if not args.check:
        readme.write_text(after, encoding="utf-8")
    elif before != after:
        print("README.md is not what the results say: python examples/demo_report.py renders it", file=sys.stderr)
    return int(args.check and before != after)


if __name__ == "__main__":
    sys.exit(main())
