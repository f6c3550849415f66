"""The pictures of a run: roofline, time relative to the baseline, peak memory. PNG and SVG, legible at half size.

A GPU's run shows seconds' worth (TFLOP/s); a CPU's times mean little elsewhere, and beyond the roofline, whose ceilings
were measured beside its points, it shows ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from _cells import PASSES
from _registry import labels
from _results import CellRow, Run, device_name, line

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

#: Colour (told apart by colour-blind readers too) and marker of a contender.
STYLE = {
    "cosine": ("#000000", "o"),
    "gssf": ("#D55E00", "*"),
    "gssf_one_pass": ("#E69F00", "^"),
    "gssf_fold_product": ("#CC79A7", "v"),
    "torch": ("#0072B2", "s"),
    "torch_compile": ("#56B4E9", "D"),
    "dense": ("#009E73", "X"),
}
SIZES = {"*": 17, "o": 9, "^": 10, "v": 10, "s": 9, "D": 8, "X": 10}
TITLES = {"forward": "forward", "forward+backward": "forward + backward"}
RC: dict[Any, Any] = {
    "font.size": 17,
    "axes.titlesize": 18,
    "axes.grid": True,
    "grid.alpha": 0.35,
    "lines.linewidth": 2.2,
    "legend.fontsize": 16,
    "svg.hashsalt": "gssf",  # the same run draws the same file
    "figure.constrained_layout.use": True,
}


def _cells(run: Run, dtype: str, mode: str) -> list[CellRow]:
    return [c for c in run["cells"].values() if c["dtype"] == dtype and c["mode"] == mode]


def _dtypes(run: Run) -> list[str]:
    return list(dict.fromkeys(cell["dtype"] for cell in run["cells"].values()))


def _mark(name: str) -> dict[str, Any]:
    colour, marker = STYLE.get(name, ("#666666", "P"))
    ours = name == "gssf"
    return {
        "color": colour,
        "marker": marker,
        "markersize": SIZES.get(marker, 9),
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
        "zorder": 4 if ours else 3,
        "label": labels().get(name, name),
    }


def _plain(value: float, _position: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _at(axis: Any, values: list[float]) -> None:
    """Ticks at these values, written out, and no others."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend for all panels, under them."""
    seen: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    order = [label for label in labels().values() if label in seen]
    columns = len(order) if len(order) <= 5 else 4
    figure.legend([seen[o] for o in order], order, loc="outside lower center", ncols=max(columns, 1), frameon=False)


def roofline(run: Run) -> Figure | None:
    """Arithmetic intensity against the rate at which the mathematics was done, under the measured ceilings."""
    dtypes = _dtypes(run)
    if not dtypes or run["ceilings"] is None:
        return None
    unit, scale = ("TFLOP/s", 1e12) if run["device"]["type"] == "cuda" else ("GFLOP/s", 1e9)
    bandwidth = run["ceilings"]["copy_bytes_per_second"]["best"]
    figure, grid = plt.subplots(len(dtypes), 2, figsize=(15, 1.4 + 5.6 * len(dtypes)), squeeze=False)
    for row, dtype in zip(grid, dtypes, strict=True):
        peak = run["ceilings"]["flops_per_second"][dtype]["best"]
        for ax, mode in zip(row, PASSES, strict=True):
            points = _points(_cells(run, dtype, mode))
            intensities = [x for xs, _ in points.values() for x in xs] or [peak / bandwidth]
            low, high = min([*intensities, peak / bandwidth]) / 2, max([*intensities, peak / bandwidth]) * 2
            ridge = peak / bandwidth
            xs = [low, ridge, high]
            ax.plot(xs, [min(peak, bandwidth * x) / scale for x in xs], color="#444444", zorder=1)
            bytes_unit = f"{bandwidth / 1e12:.2f} TB/s" if bandwidth >= 1e12 else f"{bandwidth / 1e9:.1f} GB/s"
            text = f"product {peak / scale:,.0f} {unit}, copy {bytes_unit}"
            ax.text(0.985, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=15, color="#444444")
            for name, (flop_per_byte, rates) in points.items():
                ax.plot(flop_per_byte, [r / scale for r in rates], linestyle="", **_mark(name))
            ax.set(xscale="log", yscale="log", title=f"{dtype}, {TITLES[mode]}", xlim=(low, high))
            reached = [rate for _, rates in points.values() for rate in rates]
            ax.set_ylim(min([*reached, peak / 10]) / scale / 1.6, max([*reached, peak]) / scale * 2.2)
            ax.xaxis.set_major_formatter(FuncFormatter(_plain))
            ax.yaxis.set_major_formatter(FuncFormatter(_plain))
            _thin_minor(ax)
            ax.set_xlabel("arithmetic intensity, FLOP/byte")
        row[0].set_ylabel(unit)
    figure.suptitle(f"Roofline, a point a shape: {device_name(run)}")
    _legend(figure, list(grid.flat))
    return figure


def _thin_minor(ax: Axes) -> None:
    """A log axis within one decade has no labelled tick but those between: 2 and 5 are enough."""
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        decades = range(-6, 10)
        ticks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if high / low < 300 else (1,))]
        _at(axis, [t for t in ticks if low <= t <= high])


def _points(cells: list[CellRow]) -> dict[str, tuple[list[float], list[float]]]:
    points: dict[str, tuple[list[float], list[float]]] = {}
    for cell in cells:
        for name, entry in cell["contenders"].items():
            if entry["status"] == "ok":
                xs, ys = points.setdefault(name, ([], []))
                xs.append(entry["flops"] / entry["bytes"])
                ys.append(entry["flops"] / entry["seconds"]["median"])
    return points


def _series(cells: list[CellRow], axis: str, value: Callable[[CellRow], Any]) -> dict[str, list[tuple[float, Any]]]:
    """Contender to its (x, value), in x's order."""
    series: dict[str, list[tuple[float, Any]]] = {}
    for cell in cells:
        for name, entry in cell["contenders"].items():
            found = value(entry) if entry["status"] == "ok" else None
            if found is not None:
                series.setdefault(name, []).append((cell[axis[0]], found))
    return series


def relative(run: Run, dtype: str) -> Figure | None:
    """Time over the baseline's of the same round, median and quartiles, along M = N, D and B."""
    axes_names = {"MN": "M = N", "D": "D", "B": "B"}
    figure, grid = plt.subplots(2, 3, figsize=(19, 11.5), squeeze=False, sharey="row")
    drawn = False
    for row, mode in zip(grid, PASSES, strict=True):
        for ax, (axis, name) in zip(row, axes_names.items(), strict=True):
            fixed, cells = line(_cells(run, dtype, mode), axis)
            for contender, found in _series(cells, axis, lambda entry: entry.get("relative")).items():
                drawn = drawn or len(found) > 1  # a lone point is no picture
                xs, medians = [x for x, _ in found], [s["median"] for _, s in found]
                spread = [[s["median"] - s["q1"] for _, s in found], [s["q3"] - s["median"] for _, s in found]]
                ax.errorbar(xs, medians, yerr=spread, capsize=4, **_mark(contender))
            ax.set(xscale="log", yscale="log", title=f"{TITLES[mode]}\n{fixed}", xlabel=name)
            if cells:
                _at(ax.xaxis, sorted({float(c[axis[0]]) for c in cells}))
        row[0].set_ylabel("time / cosine's")
        low, high = row[0].get_ylim()
        ticks = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100]
        _at(row[0].yaxis, [t for t in ticks if low <= t <= high])
    figure.suptitle(f"Time relative to cosine, {dtype}: {device_name(run)}")
    _legend(figure, list(grid.flat))
    return figure if drawn else None


def memory(run: Run, dtype: str) -> Figure | None:
    """Peak memory beyond the inputs along M = N, results included."""
    figure, row = plt.subplots(1, 2, figsize=(15, 7.5), sharey=True)
    drawn = False
    for ax, mode in zip(row, PASSES, strict=True):
        fixed, cells = line(_cells(run, dtype, mode), "MN")
        for contender, found in _series(cells, "MN", lambda entry: entry.get("peak_bytes")).items():
            drawn = drawn or len(found) > 1
            ax.plot([x for x, _ in found], [peak / 2**20 for _, peak in found], **_mark(contender))
        ax.set(xscale="log", yscale="log", title=f"{TITLES[mode]}, {fixed}", xlabel="M = N")
        if cells:
            _at(ax.xaxis, sorted({float(c["M"]) for c in cells}))
    low, high = row[0].get_ylim()
    step = (1, 2, 5) if high / low < 300 else (1,)
    _at(row[0].yaxis, [t for t in (m * 10.0**d for d in range(-3, 7) for m in step) if low <= t <= high])
    row[0].set_ylabel("peak memory, MiB")
    figure.suptitle(f"Peak memory beyond the inputs, {dtype}: {device_name(run)}")
    _legend(figure, list(row))
    return figure if drawn else None


def draw(run: Run, out: Path) -> list[Path]:
    """Every picture the run has cells for, beside its JSON `out`; their paths."""
    written: list[Path] = []
    with plt.rc_context(RC):
        pictures = {"roofline": roofline(run)}
        for dtype in _dtypes(run):
            pictures[f"relative-{dtype}"] = relative(run, dtype)
            pictures[f"memory-{dtype}"] = memory(run, dtype)
        for name, figure in pictures.items():
            if figure is None:
                continue
            for suffix, extra in (("png", {"dpi": 100}), ("svg", {"metadata": {"Date": None}})):
                path = out.with_name(f"{out.stem}-{name}.{suffix}")
                figure.savefig(path, format=suffix, **extra)
                written.append(path)
        plt.close("all")
    return written
