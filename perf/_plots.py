"""The pictures of a run: roofline, time relative to the baseline, peak memory. PNG and SVG, legible at half size.

A GPU's run shows seconds' worth (TFLOP/s); a CPU's times mean little elsewhere, and beyond the roofline, whose ceilings
were measured beside its points, it shows ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from _cells import DTYPES
from _operation import Operation
from _registry import OPERATIONS, labels
from _results import CellRow, Run, device_name, line

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

#: Colour (told apart by colour-blind readers too) and marker of contenders that several operations have, and …
STYLE = {
    "gssf": ("#D55E00", "*"),
    "gssf_one_pass": ("#E69F00", "^"),
    "gssf_fold_product": ("#CC79A7", "v"),
    "torch": ("#0072B2", "s"),
    "torch_compile": ("#56B4E9", "D"),
    "dense": ("#009E73", "X"),
}
#: … of an operation's baseline, and of its others, in turn.
BASELINE_STYLE = ("#000000", "o")
OTHER_STYLES = (("#332288", "P"), ("#882255", "h"), ("#999933", "p"), ("#661100", "<"), ("#44AA99", ">"),
                *reversed(STYLE.values()))  # fmt: skip
SIZES = {"*": 17, "o": 9, "^": 10, "v": 10, "s": 9, "D": 8, "X": 10, "P": 10, "h": 10, "p": 10, "<": 10, ">": 10}
#: Of a contender in a legend.
LEGEND_INCHES = 3.6
TITLES = {"forward": "forward", "forward+backward": "forward + backward"}
#: Of the axis of ratios, within about a decade and beyond.
FINE_TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
COARSE_TICKS = tuple(m * 10.0**d for d in range(-3, 4) for m in (1, 2, 5))
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


def styles(operation: Operation) -> dict[str, tuple[str, str]]:
    """Colour and marker of each contender, no two alike."""
    names = [c.name for c in operation.contenders]
    chosen = {name: STYLE[name] for name in names if name in STYLE} | {operation.baseline: BASELINE_STYLE}
    others = (style for style in OTHER_STYLES if style not in chosen.values())
    return {name: chosen[name] if name in chosen else next(others) for name in names}


def _cells(run: Run, operation: Operation, dtype: str, mode: str) -> list[CellRow]:
    wanted = (operation.name, dtype, mode)
    return [c for c in run["cells"].values() if (c["operation"], c["dtype"], c["mode"]) == wanted]


def _dtypes(run: Run, operation: Operation) -> list[str]:
    found = {cell["dtype"] for cell in run["cells"].values() if cell["operation"] == operation.name}
    return [dtype for dtype in DTYPES if dtype in found]


def _mark(operation: Operation, name: str) -> dict[str, Any]:
    colour, marker = styles(operation)[name]
    ours = name == "gssf"
    return {
        "color": colour,
        "marker": marker,
        "markersize": SIZES.get(marker, 9),
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
        "zorder": 4 if ours else 3,
        "label": labels(operation.name)[name],
    }


def _plain(value: float, _position: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _at(axis: Any, values: list[float]) -> None:
    """Ticks at these values, written out, and no others."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _legend(figure: Figure, operation: Operation, axes: list[Axes]) -> None:
    """One legend for all panels, under them."""
    seen: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    order = [label for label in labels(operation.name).values() if label in seen]
    order += sorted(seen.keys() - set(order))
    fitting = max(1, int(figure.get_figwidth() / LEGEND_INCHES))
    rows = -(-len(order) // min(fitting, 5))
    columns = -(-len(order) // max(rows, 1))
    figure.legend([seen[o] for o in order], order, loc="outside lower center", ncols=max(columns, 1), frameon=False)


def roofline(run: Run, operation: Operation) -> Figure | None:
    """Arithmetic intensity against the rate at which the mathematics was done, under the measured ceilings."""
    dtypes = [
        dtype
        for dtype in _dtypes(run, operation)
        if any(_points(_cells(run, operation, dtype, mode)) for mode in operation.modes)
    ]
    if not dtypes or run["ceilings"] is None:
        return None
    unit, scale = ("TFLOP/s", 1e12) if run["device"]["type"] == "cuda" else ("GFLOP/s", 1e9)
    bandwidth = run["ceilings"]["copy_bytes_per_second"]["best"]
    columns = len(operation.modes)
    figure, grid = plt.subplots(len(dtypes), columns, figsize=(2 + 6.5 * columns, 2 + 5.6 * len(dtypes)), squeeze=False)
    for row, dtype in zip(grid, dtypes, strict=True):
        peak = run["ceilings"]["flops_per_second"][dtype]["best"]
        for ax, mode in zip(row, operation.modes, strict=True):
            points = _points(_cells(run, operation, dtype, mode))
            intensities = [x for xs, _ in points.values() for x in xs] or [peak / bandwidth]
            low, high = min([*intensities, peak / bandwidth]) / 2, max([*intensities, peak / bandwidth]) * 2
            ridge = peak / bandwidth
            xs = [low, ridge, high]
            ax.plot(xs, [min(peak, bandwidth * x) / scale for x in xs], color="#444444", zorder=1)
            bytes_unit = f"{bandwidth / 1e12:.2f} TB/s" if bandwidth >= 1e12 else f"{bandwidth / 1e9:.1f} GB/s"
            text = f"product {peak / scale:,.0f} {unit}, copy {bytes_unit}"
            ax.text(0.985, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=16, color="#444444")
            for name, (flop_per_byte, rates) in points.items():
                ax.plot(flop_per_byte, [r / scale for r in rates], linestyle="", **_mark(operation, name))
            ax.set(xscale="log", yscale="log", title=f"{dtype}, {TITLES[mode]}", xlim=(low, high))
            reached = [rate for _, rates in points.values() for rate in rates]
            ax.set_ylim(min([*reached, peak / 10]) / scale / 1.6, max([*reached, peak]) / scale * 3)
            ax.xaxis.set_major_formatter(FuncFormatter(_plain))
            ax.yaxis.set_major_formatter(FuncFormatter(_plain))
            _thin_minor(ax)
            ax.set_xlabel("arithmetic intensity, FLOP/byte")
        row[0].set_ylabel(unit)
    figure.suptitle(f"{operation.name}, roofline, a point a shape\n{device_name(run)}")
    _legend(figure, operation, list(grid.flat))
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
            # A single call beside no other says too little of a rate.
            if entry["status"] == "ok" and "seconds" in entry and entry["seconds"]["n"] > 1:
                xs, ys = points.setdefault(name, ([], []))
                xs.append(entry["flops"] / entry["bytes"])
                ys.append(entry["flops"] / entry["seconds"]["median"])
    return points


def _moving(axis: str) -> str:
    """The size on the x-axis of "MN", or of a size."""
    return "M" if axis == "MN" else axis


def _axis_name(axis: str) -> str:
    return "M = N" if axis == "MN" else axis


def _series(cells: list[CellRow], axis: str, value: Callable[[CellRow], Any]) -> dict[str, list[tuple[float, Any]]]:
    """Contender to its (x, value), in x's order."""
    series: dict[str, list[tuple[float, Any]]] = {}
    for cell in cells:
        for name, entry in cell["contenders"].items():
            found = value(entry) if entry["status"] == "ok" else None
            if found is not None:
                series.setdefault(name, []).append((cell[_moving(axis)], found))
    return series


def _ratio(entry: CellRow) -> Any:
    return entry.get("relative")


def relative(run: Run, operation: Operation, dtype: str) -> Figure | None:
    """Time over the baseline's of the same round, median and quartiles, along each of the operation's axes."""
    axes = [axis for axis in operation.axes if _is_line(run, operation, dtype, axis, _ratio)]
    if not axes:
        return None
    rows, columns = len(operation.modes), len(axes)
    size = (2 + 5.8 * columns, 2 + 5 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey="row")
    for row, mode in zip(grid, operation.modes, strict=True):
        for ax, axis in zip(row, axes, strict=True):
            fixed, cells = line(_cells(run, operation, dtype, mode), axis)
            for contender, found in _series(cells, axis, _ratio).items():
                xs, medians = [x for x, _ in found], [s["median"] for _, s in found]
                spread = [[s["median"] - s["q1"] for _, s in found], [s["q3"] - s["median"] for _, s in found]]
                ax.errorbar(xs, medians, yerr=spread, capsize=4, **_mark(operation, contender))
            ax.set(xscale="log", yscale="log", title=f"{TITLES[mode]}\n{fixed}", xlabel=_axis_name(axis))
            if cells:
                _at(ax.xaxis, sorted({float(c[_moving(axis)]) for c in cells}))
        row[0].set_ylabel(f"time / {operation.relative_to}'s")
        low, high = row[0].get_ylim()
        _at(row[0].yaxis, [t for t in (FINE_TICKS if high / low < 12 else COARSE_TICKS) if low <= t <= high])
    figure.suptitle(f"{operation.name}, time relative to {operation.relative_to}, {dtype}\n{device_name(run)}")
    _legend(figure, operation, list(grid.flat))
    return figure


def _is_line(
    run: Run, operation: Operation, dtype: str, axis: str, value: Callable[[CellRow], Any], mode: str | None = None
) -> bool:
    """Whether someone has values along `axis`, in this mode or in any: a lone point is no picture."""
    modes = operation.modes if mode is None else (mode,)
    series = (_series(line(_cells(run, operation, dtype, one), axis)[1], axis, value) for one in modes)
    return any(len(points) > 1 for found in series for points in found.values())


def _along(
    run: Run,
    operation: Operation,
    dtype: str,
    value: Callable[[CellRow], Any],
    name: str,
    title: str,
    bar: float | None = None,
) -> Figure | None:
    """A value along the operation's first axis, and the bar it must stay below, if there is one."""
    axis = operation.axes[0]
    modes = [mode for mode in operation.modes if _is_line(run, operation, dtype, axis, value, mode)]
    if not modes:
        return None
    columns = len(modes)
    figure, grid = plt.subplots(1, columns, figsize=(2 + 6.5 * columns, 8), sharey=True, squeeze=False)
    row = grid[0]
    for ax, mode in zip(row, modes, strict=True):
        fixed, cells = line(_cells(run, operation, dtype, mode), axis)
        for contender, found in _series(cells, axis, value).items():
            ax.plot([x for x, _ in found], [y for _, y in found], **_mark(operation, contender))
        if bar is not None:
            ax.axhline(bar, color="#444444", linestyle="--", linewidth=1.5, label=f"ours may err {bar:g}")
        ax.set(xscale="log", yscale="log", title=f"{TITLES[mode]}\n{fixed}", xlabel=_axis_name(axis))
        if cells:
            _at(ax.xaxis, sorted({float(c[_moving(axis)]) for c in cells}))
    low, high = row[0].get_ylim()
    step = (1, 2, 5) if high / low < 300 else (1,)
    _at(row[0].yaxis, [t for t in (m * 10.0**d for d in range(-9, 7) for m in step) if low <= t <= high])
    row[0].set_ylabel(name)
    figure.suptitle(f"{operation.name}, {title}, {dtype}\n{device_name(run)}")
    _legend(figure, operation, list(row))
    return figure


def memory(run: Run, operation: Operation, dtype: str) -> Figure | None:
    """Peak memory beyond the inputs, results included."""

    def mebibytes(entry: CellRow) -> float | None:
        return entry["peak_bytes"] / 2**20 if "peak_bytes" in entry else None

    return _along(run, operation, dtype, mebibytes, "peak memory, MiB", "peak memory beyond the inputs")


def errors(run: Run, operation: Operation, dtype: str) -> Figure | None:
    """The largest relative error of the result and its gradients, where errors are part of what is compared."""
    if operation.bars is None:
        return None
    title = "largest error of the loss or a gradient"
    return _along(
        run, operation, dtype, lambda entry: entry.get("error"), "relative error", title, operation.bars[dtype]
    )


def draw(run: Run, out: Path) -> list[Path]:
    """Every picture the run has cells for, beside its JSON `out`; their paths.

    Their names begin with the operation's where the run measured several.
    """
    written: list[Path] = []
    measured = dict.fromkeys(cell["operation"] for cell in run["cells"].values())
    with plt.rc_context(RC):
        pictures: dict[str, Figure | None] = {}
        for operation in (OPERATIONS[name] for name in measured):
            prefix = f"{operation.name}-" if len(measured) > 1 else ""
            pictures[f"{prefix}roofline"] = roofline(run, operation)
            for dtype in _dtypes(run, operation):
                pictures[f"{prefix}relative-{dtype}"] = relative(run, operation, dtype)
                pictures[f"{prefix}memory-{dtype}"] = memory(run, operation, dtype)
                pictures[f"{prefix}errors-{dtype}"] = errors(run, operation, dtype)
        for name, figure in pictures.items():
            if figure is None:
                continue
            for suffix, extra in (("png", {"dpi": 100}), ("svg", {"metadata": {"Date": None}})):
                path = out.with_name(f"{out.stem}-{name}.{suffix}")
                figure.savefig(path, format=suffix, **extra)
                written.append(path)
        plt.close("all")
    return written
