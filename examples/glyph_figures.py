"""The pictures of the glyph example: learning curves, and a sheet of queries with what they retrieved."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from glyph_training import METRICS, TITLES
from torch import Tensor

#: Okabe and Ito's colours, which colour-blind readers can tell apart; each curve also has its own marker.
COLOURS = dict(zip(METRICS, ("#555555", "#E69F00", "#0072B2", "#009E73"), strict=True))
MARKERS = dict(zip(METRICS, "osD^", strict=True))
RIGHT, WRONG = "#00725A", "#8A8A8A"


def learning_curves(results: list[dict[str, Any]], path: Path) -> None:
    """rsum on unseen names by training step: one curve a metric, with a band from the lowest to the highest seed."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for metric in METRICS:
        runs = [run["history"] for run in results if run["metric"] == metric]
        if not runs:
            continue
        steps = [point["step"] for point in runs[0]]
        values = np.array([[point["rsum"] for point in run] for run in runs])
        axes.plot(
            steps, values.mean(0), label=TITLES[metric], color=COLOURS[metric], marker=MARKERS[metric], markersize=5
        )
        if len(runs) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=COLOURS[metric], alpha=0.15, linewidth=0)
    seeds = len({run["seed"] for run in results})
    axes.set_xlabel("training steps")
    axes.set_ylabel("rsum on unseen names (%, at most 600)")
    axes.set_title(f"Glyph–name retrieval, {seeds} seed{'s' * (seeds > 1)}" + (", band: all seeds" * (seeds > 1)))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)


def _glyph(axes: Any, image: Tensor) -> None:
    axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _frame(axes: Any, colour: str, width: float) -> None:
    for spine in axes.spines.values():
        spine.set_edgecolor(colour)
        spine.set_linewidth(width)


def _pick(ranks: Tensor, count: int, seed: int) -> list[int]:
    """Random queries, drawn by seed. The last two are misses, if there are any: a sheet of hits alone would flatter."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ranks), generator=generator)
    hits = [int(i) for i in order if ranks[i] == 0]
    misses = [int(i) for i in order if ranks[i] > 0]
    missed = min(2, len(misses))
    chosen = hits[: count - missed] + misses[:missed]
    return chosen + misses[missed : missed + count - len(chosen)]


def retrieval_sheet(S: Tensor, images: Tensor, names: tuple[str, ...], title: str, path: Path, seed: int = 0) -> None:
    """Query glyphs with their five best names, and query names with their six best glyphs; the right one is marked."""
    queries, top_names, top_glyphs = 6, 5, 6
    figure = plt.figure(figsize=(13, 8.2), layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels: Any = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    left, right = panels

    left.suptitle("glyph → names", fontsize=12)
    order = S.argsort(dim=1, descending=True, stable=True)
    ranks = (order == torch.arange(len(S))[:, None]).int().argmax(1)
    grid = left.subplots(queries, 2, width_ratios=(1, 4.6))
    for (glyph, text), query in zip(grid, _pick(ranks, queries, seed), strict=True):
        _glyph(glyph, images[query])
        text.axis("off")
        for place, answer in enumerate(order[query, :top_names].tolist()):
            correct = answer == query
            line = textwrap.shorten(names[answer], 52, placeholder="…")
            text.text(
                0, 0.94 - place * 0.18, f"{'✓' if correct else '·'} {place + 1}. {line}", fontsize=8.5, va="center",
                color=RIGHT if correct else WRONG, fontweight="bold" if correct else "normal",
            )  # fmt: skip
        if ranks[query] >= top_names:
            line = textwrap.shorten(names[query], 46, placeholder="…")
            wanted = f"wanted: {line}, at {int(ranks[query]) + 1}"
            text.text(0, 0.94 - top_names * 0.18, wanted, fontsize=8.5, va="center", style="italic")

    right.suptitle("name → glyphs", fontsize=12)
    order = S.argsort(dim=0, descending=True, stable=True).mT
    ranks = (order == torch.arange(len(S))[:, None]).int().argmax(1)
    grid = right.subplots(queries, top_glyphs + 1, width_ratios=(2.6, *[1] * top_glyphs))
    for row, query in zip(grid, _pick(ranks, queries, seed + 1), strict=True):
        row[0].axis("off")
        wrapped = "\n".join(textwrap.wrap(names[query], 20)[:4])
        if ranks[query] >= top_glyphs:
            wrapped += f"\n(its glyph is at {int(ranks[query]) + 1})"
        row[0].text(0, 0.5, wrapped, fontsize=8.5, va="center")
        for place, answer in enumerate(order[query, :top_glyphs].tolist()):
            axes = row[1 + place]
            correct = answer == query
            _glyph(axes, images[answer])
            _frame(axes, RIGHT if correct else "#CCCCCC", 3 if correct else 0.8)
            if correct:
                axes.set_title("✓", color=RIGHT, fontsize=11, pad=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)
