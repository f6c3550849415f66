"""Train a retrieval model with GSSF on real images and text: glyphs and their Unicode names.

    python examples/glyph_retrieval.py --out runs/demo
    python examples/glyph_retrieval.py --out runs/hinge --loss triplet        # all negatives first, then the hardest
    python examples/glyph_retrieval.py --out runs/student --loss distillation --teacher runs/demo/both-0.pt --dim 64

Trains the same two towers under cosine, Diag, B-Diag and both terms, tests each on 1,000 names never seen in training
(one glyph a name, 1,000 × 1,000), prints the table it measured, and writes to --out: results.json, learning_curve.png
and .svg, retrieval_sheet.png, and a checkpoint a run. Called again, it resumes an interrupted run and skips finished
ones.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from glyph_figures import learning_curves, retrieval_sheet
from glyph_training import LOSSES, METRICS, TITLES, Run, Settings, similarities, test_pairs
from tqdm import tqdm

import gssf_triton
from gssf_triton import console
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.data.glyphs import Glyphs, load_glyphs
from gssf_triton.storage import json_rows, replacing

COLUMNS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metric", default="all", choices=("all", *METRICS), help="which column (default: all four)")
    parser.add_argument("--loss", default=defaults.loss, choices=LOSSES, help="default: %(default)s")
    parser.add_argument(
        "--teacher", type=Path, metavar="CHECKPOINT", help="with --loss distillation: an earlier run's, METRIC-SEED.pt"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="names a batch (%(default)s)")
    parser.add_argument("--dim", type=int, default=defaults.dim, help="channels D (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=defaults.block_size, help="B, divides D (%(default)s)")
    parser.add_argument("--held-out", type=int, default=defaults.held_out, help="test names (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/glyphs"), help="folder (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over: forget the checkpoints in --out")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "dim", "block_size", "held_out", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if (args.loss == "distillation") != (args.teacher is not None):
        parser.error("--loss distillation needs --teacher, an earlier run's checkpoint, and no other loss takes one")
    if args.teacher is not None and not args.teacher.is_file():
        parser.error(f"--teacher: there is no {args.teacher}")
    try:
        pictures = [args.out / name for name in ("learning_curve.png", "learning_curve.svg", "retrieval_sheet.png")]
        for path in (args.out / "results.json", *pictures, *checkpoints(args)):
            check_output("--out", path, args.teacher)
    except UsageError as fault:
        parser.error(str(fault))
    if args.dim % args.block_size:
        parser.error(f"--block-size must divide --dim = {args.dim}, got {args.block_size}")
    return args


def checkpoints(args: argparse.Namespace) -> list[Path]:
    """The checkpoints of this run; with --fresh also those of earlier runs."""
    metrics = METRICS if args.metric == "all" else (args.metric,)
    mine = [args.out / f"{metric}-{args.seed + i}.pt" for metric in metrics for i in range(args.seeds)]
    return [*mine, *(path for metric in METRICS for path in args.out.glob(f"{metric}-*.pt") if args.fresh)]


def describe_runs(results: list[dict[str, Any]]) -> str:
    """The measured table: means over the seeds, and standard deviations if there are several seeds."""
    lines = ["| metric | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    seeds = sorted({run["seed"] for run in results})
    for metric in METRICS:
        finals = [run["history"][-1] for run in results if run["metric"] == metric]
        if not finals:
            continue
        cells = []
        for column in COLUMNS:
            values = [final[column] for final in finals]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        lines.append(f"| {TITLES[metric]} | " + " | ".join(cells) + " |")
    if len(seeds) == 1:
        note = "One seed: seeds alone move rsum by several points, so this table tells no metric from another."
    else:
        note = f"Mean ± standard deviation over {len(seeds)} seeds; what lies within that is noise."
    return "\n".join(lines) + "\n\n" + note


def save_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json_rows(content) + "\n").encode())


def train_all(
    args: argparse.Namespace, settings: Settings, glyphs: Glyphs, device: torch.device
) -> list[dict[str, Any]]:
    train, test = glyphs.split(settings.held_out)
    pairs = test_pairs(test)
    metrics = METRICS if args.metric == "all" else (args.metric,)
    columns = [(metric, seed) for seed in range(args.seed, args.seed + args.seeds) for metric in metrics]
    results: list[dict[str, Any]] = []
    sheet_from: Run | None = None
    started = time.monotonic()
    with tqdm(total=len(columns) * settings.steps, unit="step", smoothing=0.05) as bar:
        for metric, seed in columns:
            run = Run(settings, metric, seed, train, pairs, device, args.out / f"{metric}-{seed}.pt")
            bar.update(run.step)
            bar.set_description(f"{TITLES[metric]}, seed {seed}")
            for measured in run.train():
                bar.update()
                bar.set_postfix(loss=f"{measured['loss']:.2f}", refresh=False)
            results.append({"metric": metric, "seed": seed, "history": run.history})
            sheet_from = run
    assert sheet_from is not None
    content = {
        "settings": asdict(settings), "device": str(device), "seconds_this_call": round(time.monotonic() - started, 1),
        "train_names": len(train.names), "train_images": len(train), "test_names": len(test.names),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gssf": gssf_triton.__version__},
        "runs": results,
    }  # fmt: skip
    save_json(args.out / "results.json", content)
    learning_curves(results, args.out / "learning_curve")
    title = (
        f"{len(test.names):,} names never seen in training: metric {TITLES[sheet_from.metric]}, seed {sheet_from.seed}"
    )
    S = similarities(sheet_from.model, *pairs)
    retrieval_sheet(S, pairs[0], test.names, title, args.out / "retrieval_sheet.png")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    console.ready()
    args = parse(argv)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    settings = Settings(
        steps=args.steps, batch_size=args.batch_size, dim=args.dim, block_size=args.block_size, loss=args.loss,
        held_out=args.held_out, teacher=str(args.teacher or ""),
    )  # fmt: skip
    if args.fresh:
        for path in checkpoints(args):
            path.unlink(missing_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        results = train_all(args, settings, load_glyphs(), torch.device(chosen))
    except ValueError as fault:
        print(f"glyph_retrieval: {fault}", file=sys.stderr)
        return 2
    print(f"\nR@K in percent on {settings.held_out:,} unseen names, one glyph each (i2t: glyph to name)\n")
    print(describe_runs(results))
    print(f"\nwritten to {args.out}: results.json, learning_curve.png, retrieval_sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
