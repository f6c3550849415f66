"""Means, paired tests, tables and plots of the studies' result files."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from study_trainer import Column

#: A difference counts if its p, corrected for all comparisons of a study, is below this.
LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """One column against the first, seed by seed.

    Attributes:
        column: The column.
        values: Its headline number a seed, in the order of the seeds that both columns have.
        mean: Mean of its values.
        std: Sample standard deviation, NaN of one seed.
        difference: Mean of the paired differences, None of the first column itself.
        interval: Half the width of its 95 % confidence interval.
        p: Two-sided p of the paired t test, NaN of fewer than two seeds.
        p_holm: p after Holm's correction over the study's columns.
    """

    column: str
    values: tuple[float, ...]
    mean: float
    std: float
    difference: float | None = None
    interval: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan

    @property
    def verdict(self) -> str:
        """Whether the corrected test shows the column better or worse than the first, or no difference."""
        if self.difference is None or not self.p_holm < LEVEL:
            return "no difference shown"
        return "better" if self.difference > 0 else "worse"


def holm(ps: list[float]) -> list[float]:
    """Holm's step-down correction of several p values (Holm, 1979); NaN stays NaN and is not counted."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    corrected, reached = [math.nan] * len(ps), 0.0
    for place, i in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - place) * ps[i]))
        corrected[i] = reached
    return corrected


def _values(results: dict[str, Any], column: str, number: str) -> dict[int, float]:
    return {run["seed"]: run["final"][number] for run in results["runs"] if run["column"] == column}


def compare(results: dict[str, Any], number: str | None = None) -> list[Comparison]:
    """Every column against the first, by the study's headline number or another."""
    number = number or results["headline"]
    columns = list(dict.fromkeys(run["column"] for run in results["runs"]))
    if not columns:
        return []
    base = _values(results, columns[0], number)
    plain = []
    for column in columns:
        values = _values(results, column, number)
        spread = statistics.stdev(values.values()) if len(values) > 1 else math.nan
        found = Comparison(column, tuple(values.values()), statistics.fmean(values.values()), spread)
        if column != columns[0]:
            shared = sorted(values.keys() & base.keys())
            differences = np.array([values[seed] - base[seed] for seed in shared])
            interval = p = math.nan
            if len(shared) > 1:
                error = differences.std(ddof=1) / math.sqrt(len(shared))
                interval = float(stats.t.ppf(0.975, len(shared) - 1) * error)
                # All differences are equal: no variance to test against.
                p = float(stats.ttest_1samp(differences, 0.0).pvalue) if error > 0 else math.nan
            mean = float(differences.mean()) if len(shared) else math.nan
            found = Comparison(column, found.values, found.mean, found.std, mean, interval, p)
        plain.append(found)
    corrected = holm([c.p for c in plain])
    return [Comparison(**{**c.__dict__, "p_holm": p}) for c, p in zip(plain, corrected, strict=True)]


def _spread(comparison: Comparison) -> str:
    return f"{comparison.mean:.1f}" + ("" if math.isnan(comparison.std) else f" ± {comparison.std:.1f}")


def _p(value: float) -> str:
    return "–" if math.isnan(value) else ("< 0.001" if value < 0.001 else f"{value:.3f}")


def markdown(results: dict[str, Any]) -> str:
    """A study's table: mean ± standard deviation of its numbers, and the headline's paired difference from cosine."""
    others = [number for number in results["shown"] if number != results["headline"]]
    heads = ["metric", *others, results["headline_title"], "from the first (95 %)", "p", "p, Holm", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    tables = {number: {c.column: c for c in compare(results, number)} for number in others}
    for c in compare(results):
        cells = [Column.parse(c.column).title, *(_spread(tables[number][c.column]) for number in others), _spread(c)]
        if c.difference is None:
            cells += ["", "", ""]
        else:
            margin = "" if math.isnan(c.interval) else f" ± {c.interval:.2f}"
            shown = f"{c.difference:+.2f}{margin}"
            cells += [f"**{shown}**" if c.verdict != "no difference shown" else shown, _p(c.p), _p(c.p_holm)]
        lines.append("| " + " | ".join([*cells, str(len(c.values))]) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: every seed's headline number by column, seeds joined. Right: paired differences, with intervals."""
    comparisons = compare(results)
    titles = [Column.parse(c.column).title for c in comparisons]
    place = np.arange(len(comparisons))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.8 + 0.42 * len(place)), layout="constrained", sharey=True, width_ratios=(1.2, 1)
    )
    seeds = sorted({run["seed"] for run in results["runs"]})
    for seed in seeds:
        values = [_values(results, c.column, results["headline"]).get(seed, math.nan) for c in comparisons]
        left.plot(values, place, color="0.75", linewidth=0.8, marker="o", markersize=4, markerfacecolor="0.5", mew=0)
    left.plot([c.mean for c in comparisons], place, "D", color="#0072B2", markersize=7)
    left.set(
        yticks=place, yticklabels=titles, xlabel=f"{results['headline_title']}; diamonds: means", title=results["title"]
    )
    left.invert_yaxis()
    for y, c in zip(place, comparisons, strict=True):
        if c.difference is not None:
            colour = {"better": "#009E73", "worse": "#D55E00"}.get(c.verdict, "0.45")
            margin = 0.0 if math.isnan(c.interval) else c.interval
            right.errorbar(c.difference, y, xerr=margin, fmt="o", color=colour, capsize=3)
    right.axvline(0, color="0.6", linewidth=0.8)
    right.set(
        xlabel=f"difference from {titles[0] if titles else ''}, 95 % interval",
        title=f"{len(seeds)} seeds; in colour where p (Holm) < {LEVEL}",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean_of_columns(tuned: dict[str, dict[float, float]]) -> dict[float, float]:
    """Learning rate to the mean of all columns' numbers."""
    return {rate: statistics.fmean(column[rate] for column in tuned.values()) for rate in next(iter(tuned.values()))}


def rates_table(tuned: dict[str, dict[float, float]]) -> str:
    """A row a column, its number at every learning rate; the best mean of them all is bold."""
    rates = list(next(iter(tuned.values())))
    lines = ["| metric | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for column, numbers in tuned.items():
        lines.append(
            "| " + " | ".join([Column.parse(column).title, *(f"{numbers[rate]:.1f}" for rate in rates)]) + " |"
        )
    mean = mean_of_columns(tuned)
    best = max(mean, key=lambda rate: mean[rate])
    cells = [f"**{mean[rate]:.1f}**" if rate == best else f"{mean[rate]:.1f}" for rate in rates]
    lines.append("| " + " | ".join(["mean", *cells]) + " |")
    return "\n".join(lines)


KINDS = {"cosine": "cosine", "diag": "Diag", "bdiag": "B-Diag", "both": "both"}


def summary(results: list[dict[str, Any]]) -> str:
    """One row a study: its headline number in every column, bold where the paired test shows a difference."""
    lines = [
        "| study | number | " + " | ".join(KINDS.values()) + " | seeds |",
        "|---" * (len(KINDS) + 3) + "|",
    ]
    for study in results:
        cells: dict[str, list[str]] = {kind: [] for kind in KINDS}
        comparisons = compare(study)
        for c in comparisons:
            column = Column.parse(c.column)
            if column.changes:
                continue
            size = f"B = {column.block_size}: " if column.block_size else ""
            value = _spread(c)
            cells[column.kind].append(size + (f"**{value}**" if c.verdict != "no difference shown" else value))
        seeds = min(len(c.values) for c in comparisons)
        row = [
            study["title"],
            study["headline_title"],
            *("<br>".join(cells[kind]) or "–" for kind in KINDS),
            str(seeds),
        ]
        lines.append("| " + " | ".join(row) + " |")
    note = (
        "Mean ± standard deviation over the seeds. **Bold**: differs from cosine by a paired t test over the seeds, "
        f"p < {LEVEL} after Holm's correction for the study's columns; of the others no difference is shown."
    )
    return "\n".join(lines) + "\n\n" + note


def replace_between(path: Path, name: str, text: str) -> bool:
    """Put `text` between <!-- name:begin --> and <!-- name:end --> of a file; False if it lacks the markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before = path.read_text(encoding="utf-8")
    if begin not in before or end not in before:
        return False
    head, _, rest = before.partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    return True
