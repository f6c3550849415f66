"""What the frozen-feature study learns: is "the cross-channel relevancy" distinguished and highlighted?

    python examples/study_look.py

Learns diagonal and blocks on frozen features (study_frozen.py), a few seeds, and measures on names never seen:

* which channels tell matches from other pairs (`gssf_triton.viz.relevance`) under cosine, and whether W_diag is larger
  where they do: Spearman's rank correlation, and over how many channels the relevance is spread;
* how much of the separation of matches comes from the diagonal, and how much from pairs of different channels;
* the same for blocks with the learned weights in random places, as a control.

Writes look.json and look.png: W ⊙ U as a heat map, the relevance by channel and block, one pair's score taken apart,
and the similarities of matches and other pairs under cosine and under the metric.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import stats
from study_data import Source
from study_frozen import STUDY, FrozenTask, make
from study_report import holm
from study_trainer import Column, train
from torch import Tensor
from tqdm import tqdm

from gssf_triton import console, viz
from gssf_triton.command.usage import UsageError, check_output
from gssf_triton.storage import json_rows, replacing

Metric = dict[str, Any]


def matched(task: FrozenTask) -> tuple[Tensor, Tensor]:
    """The test set's images and texts in one order: one image a name."""
    test = task.test_set
    return test.images[test.image_ids.argsort()], test.texts[test.text_ids.argsort()]


def shuffled(W_blocks: Tensor, seed: int) -> Tensor:
    """The blocks' values in random places."""
    order = torch.randperm(W_blocks.numel(), generator=torch.Generator().manual_seed(seed))
    return W_blocks.flatten()[order].view_as(W_blocks)


def measure(task: FrozenTask, seed: int) -> dict[str, float]:
    """The numbers of one seed's learned metric."""
    a, b = matched(task)
    W_diag, W_blocks = (w.detach() for w in (task.metric.W_diag, task.metric.W_blocks) if w is not None)
    cosine = viz.relevance(a, b, torch.ones_like(W_diag), normalize=True)
    learned = viz.relevance(a, b, W_diag, W_blocks, normalize=True)
    inside = torch.diagonal(W_blocks, dim1=-2, dim2=-1).flatten()
    chance = viz.relevance(a, b, W_diag, shuffled(W_blocks, seed), normalize=True)
    # The blocks' diagonal belongs to W_diag's share: only the rest pairs different channels.
    own = viz.relevance(a, b, W_diag + inside, normalize=True)
    return {
        "spearman": float(stats.spearmanr((W_diag + inside).numpy(), cosine.channels.numpy()).statistic),
        "channels_cosine": float(cosine.effective_channels),
        "channels_learned": float(learned.effective_channels),
        "cross_share": 100 * float((learned.score - own.score) / learned.score),
        "cross_share_shuffled": 100 * float(chance.crossing.sum() / chance.score),
        "off_diagonal": 100 * float(1 - inside.square().sum() / W_blocks.square().sum()),
    }


#: What is tested against 0 over the seeds: a number, or the difference of two.
QUESTIONS = {
    "W_diag is larger where channels tell matches apart (rank correlation)": ("spearman", None),
    "channels that carry it, cosine less learned": ("channels_cosine", "channels_learned"),
    "share of pairs of different channels (%), learned less shuffled": ("cross_share", "cross_share_shuffled"),
}


def answers(runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and p of each question, corrected for three tests."""
    found: list[dict[str, Any]] = []
    for question, (number, other) in QUESTIONS.items():
        values = [run[number] - (run[other] if other else 0.0) for run in runs]
        few = len(values) < 2
        std = math.nan if few else float(np.std(values, ddof=1))
        p = math.nan if few else float(stats.ttest_1samp(values, 0.0).pvalue)
        found.append({"question": question, "mean": float(np.mean(values)), "std": std, "p": p})
    for answer, p in zip(found, holm([answer["p"] for answer in found]), strict=True):
        answer["p_holm"] = p
    return found


def draw(task: FrozenTask, path: Path) -> None:
    a, b = matched(task)
    metric: Metric = {"W_diag": task.metric.W_diag, "W_blocks": task.metric.W_blocks}
    ones = torch.ones(a.shape[1])
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    figure.suptitle("What W_diag and W_blocks learn on frozen features, seed 0")
    W_diag = torch.zeros_like(ones) if task.metric.W_diag is None else task.metric.W_diag.detach() - 1
    viz.plot_metric(W_diag, task.metric.W_blocks, ax=axes[0, 0])
    axes[0, 0].set_title("learned W ⊙ U, less the cosine it started from")
    for ax, title, weights in ((axes[0, 1], "cosine", {"W_diag": ones}), (axes[0, 2], "learned", metric)):
        found = viz.relevance(a, b, **weights, normalize=True)
        viz.plot_parts(found, ax=ax)
        ax.set_title(f"{title}: a match's lead, from {float(found.effective_channels):.0f} channels")
        ax.set_ylabel("part of the lead")
    parts = viz.score_parts(a[:1], b[:1], **metric, normalize=True)
    viz.plot_parts(viz.ScoreParts(parts.diagonal[0], parts.crossing[0], parts.block_size), ax=axes[1, 0])
    axes[1, 0].set_title(f"one matching pair's score, {float(parts.score[0]):.2f}, taken apart")
    for ax, title, weights in ((axes[1, 1], "cosine", {"W_diag": ones}), (axes[1, 2], "learned", metric)):
        viz.plot_similarities(viz.similarity_histogram(a, b, **weights, normalize=True), ax=ax)
        ax.set_title(f"similarities, {title}")
    for ax in axes.flat:
        ax.title.set_fontsize(10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    console.ready()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--column", default="both-32", help="a both-B column (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=STUDY.settings.steps, help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=0, help="use only so many names (0: all)")
    parser.add_argument("--tower-steps", type=int, default=0, help="steps of the towers (0: the study's own)")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        for name in ("look.json", "look.png"):
            check_output("--out", args.out / name)
    except UsageError as fault:
        parser.error(str(fault))
    column = Column.parse(args.column)
    if column.kind != "both":
        parser.error(f"--column must have both terms, got {args.column}")
    settings = column.settings(replace(STUDY.settings, steps=args.steps, evaluations=1))
    source = Source(cache=args.out, held_out=STUDY.held_out, limit=args.limit, tower_steps=args.tower_steps)
    found: list[dict[str, float]] = []
    for seed in tqdm(range(args.seeds), unit="seed"):
        task = make(settings, column, seed, source)
        for _ in train(task, {}):
            pass
        found.append(measure(task, seed))
        if seed == 0:
            draw(task, args.out / "look.png")
    summary = answers(found)
    with replacing(args.out / "look.json") as file:
        file.write((json_rows({"column": str(column), "answers": summary, "runs": found}) + "\n").encode())
    for name in found[0]:
        print(f"{name}: {np.mean([run[name] for run in found]):.3g}")
    for answer in summary:
        print(f"{answer['question']}: {answer['mean']:.3g} ± {answer['std']:.2g}, p (Holm) {answer['p_holm']:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
