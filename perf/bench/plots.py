"""The pictures of a run: roofline, time relative to the baseline, peak memory, errors. Legible at half size.

A GPU's run shows seconds' worth (TFLOP/s); a CPU's times mean little elsewhere, and beyond the roofline, whose ceilings
were measured beside its points, it shows ratios.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from bench import results
from bench.cells import DTYPES
from bench.operation import Operation
from bench.registry import OPERATIONS, labels
from bench.results import CellRow, Run, device_name, line
from gssf_triton.storage import replacing

matplotlib.use("Agg")

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
SIZES = {"*": 17, "o": 9, "s": 9, "D": 8}
#: Of a contender in a legend.
LEGEND_INCHES = 3.6
TITLES = {"forward": "forward", "forward+backward": "forward + backward"}
#: Of the axis of ratios, within about a decade and beyond.
FINE_TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
COARSE_TICKS = tuple(m * 10.0**d for d in range(-3, 4) for m in (1, 2, 5))
GREY = "#444444"
#: Of a file: a picture of few colours takes a third of the bytes of one with all.
DPI, COLOURS = 80, 128
RC: dict[Any, Any] = {
    "font.size": 17,
    "axes.titlesize": 18,
    "axes.grid": True,
    "grid.alpha": 0.35,
    "lines.linewidth": 2.2,
    "legend.fontsize": 16,
    "figure.constrained_layout.use": True,
}


def styles(operation: Operation) -> dict[str, tuple[str, str]]:
    """Colour and marker of each contender, no two alike."""
    names = [c.name for c in operation.contenders]
    chosen = {name: STYLE[name] for name in names if name in STYLE} | {operation.baseline: BASELINE_STYLE}
    others = (style for style in OTHER_STYLES if style not in chosen.values())
    return {name: chosen[name] if name in chosen else next(others) for name in names}


def _mark(operation: Operation, name: str) -> dict[str, Any]:
    colour, marker = styles(operation)[name]
    return {
        "color": colour,
        "marker": marker,
        "markersize": SIZES.get(marker, 10),
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
        "zorder": 4 if name == "gssf" else 3,
        "label": labels(operation.name)[name],
    }


def _cells(run: Run, operation: Operation, dtype: str, mode: str) -> list[CellRow]:
    wanted = (operation.name, dtype, mode)
    return [c for c in run["cells"].values() if (c["operation"], c["dtype"], c["mode"]) == wanted]


def _dtypes(run: Run, operation: Operation) -> list[str]:
    found = {cell["dtype"] for cell in run["cells"].values() if cell["operation"] == operation.name}
    return [dtype for dtype in DTYPES if dtype in found]


def _plain(value: float, _position: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _at(axis: Any, values: Collection[float]) -> None:
    """Ticks at these values, written out, and no others."""
    axis.set_major_locator(FixedLocator(sorted(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_plain))


def _at_decades(axis: Any, low: float, high: float) -> None:
    """Ticks at powers of ten, and at twice and five times them within a few decades."""
    steps = (1, 2, 5) if high / low < 300 else (1,)
    _at(axis, [t for t in (m * 10.0**d for d in range(-9, 10) for m in steps) if low <= t <= high])


def _finish(figure: Figure, operation: Operation, axes: list[Axes], title: str) -> Figure:
    """The title, and one legend for all panels, under them."""
    figure.suptitle(title)
    seen: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    order = [label for label in labels(operation.name).values() if label in seen]
    order += sorted(seen.keys() - set(order))
    fitting = max(1, int(figure.get_figwidth() / LEGEND_INCHES))
    rows = -(-len(order) // min(fitting, 5))
    columns = max(1, -(-len(order) // max(rows, 1)))
    figure.legend([seen[o] for o in order], order, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def roofline(run: Run, operation: Operation) -> Figure | None:
    """Arithmetic intensity against the rate at which the mathematics was done, under the measured ceilings."""
    points = {
        dtype: {mode: _points(_cells(run, operation, dtype, mode)) for mode in operation.modes}
        for dtype in _dtypes(run, operation)
    }
    points = {dtype: by_mode for dtype, by_mode in points.items() if any(by_mode.values())}
    if not points or run["ceilings"] is None:
        return None
    unit, scale = ("TFLOP/s", 1e12) if run["device"]["type"] == "cuda" else ("GFLOP/s", 1e9)
    bandwidth = run["ceilings"]["copy_bytes_per_second"]["best"]
    bytes_unit = f"{bandwidth / 1e12:.2f} TB/s" if bandwidth >= 1e12 else f"{bandwidth / 1e9:.1f} GB/s"
    columns = len(operation.modes)
    figure, grid = plt.subplots(len(points), columns, figsize=(2 + 6.5 * columns, 2 + 5.6 * len(points)), squeeze=False)
    for row, (dtype, by_mode) in zip(grid, points.items(), strict=True):
        peak = run["ceilings"]["flops_per_second"][dtype]["best"]
        ridge = peak / bandwidth
        for ax, (mode, found) in zip(row, by_mode.items(), strict=True):
            intensities = [ridge, *(x for xs, _ in found.values() for x in xs)]
            low, high = min(intensities) / 2, max(intensities) * 2
            xs = [low, ridge, high]
            ax.plot(xs, [min(peak, bandwidth * x) / scale for x in xs], color=GREY, zorder=1)
            text = f"product {peak / scale:,.0f} {unit}, copy {bytes_unit}"
            ax.text(0.985, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=16, color=GREY)
            for name, (flop_per_byte, rates) in found.items():
                ax.plot(flop_per_byte, [r / scale for r in rates], linestyle="", **_mark(operation, name))
            ax.set(xscale="log", yscale="log", title=f"{dtype}, {TITLES[mode]}", xlim=(low, high))
            reached = [rate for _, rates in found.values() for rate in rates]
            ax.set_ylim(min([*reached, peak / 10]) / scale / 1.6, max([*reached, peak]) / scale * 3)
            _at_decades(ax.xaxis, *ax.get_xlim())
            _at_decades(ax.yaxis, *ax.get_ylim())
            ax.set_xlabel("arithmetic intensity, FLOP/byte")
        row[0].set_ylabel(unit)
    title = f"{operation.name}, roofline, a point a shape\n{device_name(run)}"
    return _finish(figure, operation, list(grid.flat), title)


def _points(cells: list[CellRow]) -> dict[str, tuple[list[float], list[float]]]:
    """Contender to its intensities and rates; a call timed once has none."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for cell in cells:
        for name, entry in cell["contenders"].items():
            if entry["status"] == "ok" and "seconds" in entry and entry["seconds"]["n"] > 1:
                xs, ys = points.setdefault(name, ([], []))
                xs.append(entry["flops"] / entry["bytes"])
                ys.append(entry["flops"] / entry["seconds"]["median"])
    return points


Value = Callable[[CellRow], Any]


def _series(cells: list[CellRow], axis: str, value: Value) -> dict[str, list[tuple[float, Any]]]:
    """Contender to its (x, value), in x's order."""
    series: dict[str, list[tuple[float, Any]]] = {}
    for cell in cells:
        for name, entry in cell["contenders"].items():
            found = value(entry) if entry["status"] == "ok" else None
            if found is not None:
                series.setdefault(name, []).append((cell[axis[0]], found))
    return series


def _is_line(run: Run, operation: Operation, dtype: str, mode: str, axis: str, value: Value) -> bool:
    """True where someone has several values along `axis`: a lone point is no picture."""
    found = _series(line(_cells(run, operation, dtype, mode), axis)[1], axis, value)
    return any(len(points) > 1 for points in found.values())


def _panel(ax: Axes, run: Run, operation: Operation, dtype: str, mode: str, axis: str, value: Value) -> None:
    """Every contender's values along `axis`; of a spread the median and quartiles."""
    fixed, cells = line(_cells(run, operation, dtype, mode), axis)
    for contender, found in _series(cells, axis, value).items():
        xs, ys = [x for x, _ in found], [y for _, y in found]
        if isinstance(ys[0], dict):
            bars = [[s["median"] - s["q1"] for s in ys], [s["q3"] - s["median"] for s in ys]]
            ax.errorbar(xs, [s["median"] for s in ys], yerr=bars, capsize=4, **_mark(operation, contender))
        else:
            ax.plot(xs, ys, **_mark(operation, contender))
    name = "M = N" if axis == "MN" else axis
    ax.set(xscale="log", yscale="log", title=f"{TITLES[mode]}\n{fixed}", xlabel=name)
    if cells:
        _at(ax.xaxis, {float(c[axis[0]]) for c in cells})


def _picture(
    run: Run, operation: Operation, dtype: str, axes: Sequence[str], value: Value, label: str, title: str,
    ticks: Callable[[Any, float, float], None] = _at_decades, bar: float | None = None,
) -> Figure | None:  # fmt: skip
    """A value along these axes, a row a pass, or along one axis, a panel a pass; and the bar it must stay below."""
    found = [(m, a) for m in operation.modes for a in axes if _is_line(run, operation, dtype, m, a, value)]
    if not found:
        return None
    modes, axes = list(dict.fromkeys(m for m, _ in found)), [a for a in axes if a in {a for _, a in found}]
    rows, columns = (1, len(modes)) if len(axes) == 1 else (len(modes), len(axes))
    figure, grid = plt.subplots(rows, columns, figsize=(2 + 5.9 * columns, 2.5 + 5 * rows), squeeze=False, sharey="row")
    for ax, (mode, axis) in zip(grid.flat, product(modes, axes), strict=True):
        _panel(ax, run, operation, dtype, mode, axis, value)
        if bar is not None:
            ax.axhline(bar, color=GREY, linestyle="--", linewidth=1.5, label=f"ours may err {bar:g}")
    for first, *_ in grid:
        ticks(first.yaxis, *first.get_ylim())
        first.set_ylabel(label)
    return _finish(figure, operation, list(grid.flat), f"{operation.name}, {title}, {dtype}\n{device_name(run)}")


def relative(run: Run, operation: Operation, dtype: str) -> Figure | None:
    """Time over the baseline's of the same round, median and quartiles, along each of the operation's axes."""

    def ticks(axis: Any, low: float, high: float) -> None:
        _at(axis, [t for t in (FINE_TICKS if high / low < 12 else COARSE_TICKS) if low <= t <= high])

    to = operation.relative_to
    label, title = f"time / {to}'s", f"time relative to {to}"
    return _picture(run, operation, dtype, operation.axes, lambda entry: entry.get("relative"), label, title, ticks)


def memory(run: Run, operation: Operation, dtype: str) -> Figure | None:
    """Peak memory beyond the inputs, results included, along the operation's first axis."""

    def mebibytes(entry: CellRow) -> float | None:
        return entry["peak_bytes"] / 2**20 if "peak_bytes" in entry else None

    title = "peak memory beyond the inputs"
    return _picture(run, operation, dtype, operation.axes[:1], mebibytes, "peak memory, MiB", title)


def errors(run: Run, operation: Operation, dtype: str) -> Figure | None:
    """The largest relative error of the result and its gradients, where errors are part of what is compared."""
    if operation.bars is None:
        return None
    title, axes = "largest error of the loss or a gradient", operation.axes[:1]
    bar = operation.bars[dtype]
    return _picture(run, operation, dtype, axes, lambda entry: entry.get("error"), "relative error", title, bar=bar)


KINDS = {"relative": relative, "memory": memory, "errors": errors}


def _figures(run: Run, operation: Operation, kinds: Collection[str]) -> Iterator[tuple[str, Figure | None]]:
    if "roofline" in kinds:
        yield "roofline", roofline(run, operation)
    for dtype in _dtypes(run, operation):
        yield from ((f"{kind}-{dtype}", make(run, operation, dtype)) for kind, make in KINDS.items() if kind in kinds)


def draw(run: Run, out: Path, operations: Collection[str] = (), kinds: Collection[str] = ()) -> list[Path]:
    """The pictures that the run has cells for, all or of some operations and kinds, beside its JSON; their paths."""
    written: list[Path] = []
    with plt.rc_context(RC):
        for name in operations or results.operations(run):
            prefix = results.picture_prefix(run, out, name)
            for picture, figure in _figures(run, OPERATIONS[name], kinds or ("roofline", *KINDS)):
                if figure is not None:
                    written.append(out.with_name(f"{prefix}{picture}.png"))
                    _save(figure, written[-1])
        plt.close("all")
    return written


def _save(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with replacing(path) as file, Image.open(drawn) as image:
        image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            file, format="png", optimize=True
        )
