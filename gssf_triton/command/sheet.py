"""A sheet of the best matches: a page (.html, one file with its pictures in it) or a picture (.png).

Needs the extra `gssf_triton[command]`: Pillow reads the images, Matplotlib draws the picture.
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gssf_triton.command.usage import UsageError

#: The modules that draw each format.
FORMS = {".html": ("PIL.Image",), ".png": ("PIL.Image", "matplotlib.figure")}
#: Pixels of a thumbnail's longer side.
THUMBNAIL = 192
#: Inches of a cell of the picture, and dots an inch.
CELL_INCHES, DPI = 1.7, 110
#: Characters in a line, and lines, of a text in a cell of the picture.
LINE_LETTERS, LINES = 22, 7
#: A green that colour-blind readers can tell from the grey; right matches also have a tick and a wide frame.
RIGHT, WRONG = "#00725A", "#8A8A8A"

STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; }
section { display: flex; gap: .75rem; padding: .75rem 0; border-top: 1px solid #8884; overflow-x: auto; }
figure { margin: 0; flex: 0 0 auto; width: 12rem; padding: .4rem; border: 1px solid #8886; border-radius: .4rem; }
figure.query { border-color: transparent; background: #8882; }
figure.right { border: 3px solid #00725A; padding: calc(.4rem - 2px); }
img { display: block; max-width: 100%; max-height: 12rem; margin: 0 auto .3rem; }
p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
figcaption { font-variant-numeric: tabular-nums; opacity: .75; }
"""


@dataclass(frozen=True)
class Cell:
    """An item: its image, its text, or both. `right`: whether it matches the query, None if that is unknown."""

    image: Path | None
    text: str | None
    caption: str
    right: bool | None = None


@dataclass(frozen=True)
class Row:
    """A query and its matches, best first."""

    query: Cell
    matches: list[Cell]


def check_requirements(form: str) -> None:
    """Raises a UsageError if a library is missing."""
    for module in FORMS[form]:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as fault:
            raise UsageError(
                f'--sheet: a {form} sheet needs {fault.name}: pip install "gssf_triton[command]"'
            ) from None
        except OSError as fault:  # Matplotlib without a writable folder
            raise UsageError(f"--sheet: {module} cannot be used ({fault})") from None


def _thumbnail(path: Path) -> Any:
    """A small copy of the image, upright, on white."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as fault:
        raise UsageError(f"--sheet: {path}: expected an image file, got one that cannot be read ({fault})") from None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    paper = Image.new("RGB", small.size, "white")
    paper.paste(small, mask=small)
    return paper


def _figure(cell: Cell, kind: str) -> Iterator[str]:
    yield f'<figure class="{kind}">'
    if cell.image is not None:
        data = io.BytesIO()
        _thumbnail(cell.image).save(data, "JPEG", quality=88)
        name = html.escape(cell.image.name)
        encoded = base64.b64encode(data.getvalue()).decode()
        yield f'<img alt="{name}" title="{name}" src="data:image/jpeg;base64,{encoded}">'
    if cell.text is not None:
        yield f"<p>{html.escape(cell.text)}</p>"
    yield f"<figcaption>{html.escape(cell.caption)}{' ✓' if cell.right else ''}</figcaption></figure>"


def _page(title: str, rows: list[Row]) -> bytes:
    lines = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">']
    lines += ['<meta name="viewport" content="width=device-width">']
    lines += [
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>",
        f"<body><h1>{html.escape(title)}</h1>",
    ]
    for row in rows:
        lines += ["<section>", *_figure(row.query, "query")]
        for cell in row.matches:
            lines += _figure(cell, "right" if cell.right else "match")
        lines += ["</section>"]
    return "\n".join([*lines, "</body></html>", ""]).encode(errors="backslashreplace")


def drawable(text: str) -> str:
    """The text with control characters, and bytes of file names that are not UTF-8, escaped."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in text)


def _draw(axes: Any, cell: Cell, query: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if cell.image is not None:
        axes.imshow(_thumbnail(cell.image))
    if cell.text is not None:
        text = "\n".join(textwrap.wrap(drawable(cell.text), LINE_LETTERS, max_lines=LINES, placeholder=" …"))
        if cell.image is None:
            middle = {"transform": axes.transAxes, "ha": "center", "va": "center"}
            axes.text(0.5, 0.5, text, fontsize=8, parse_math=False, **middle)
        else:
            axes.set_xlabel(text, fontsize=7, parse_math=False)
    weight = "bold" if query else "normal"
    axes.set_title(cell.caption + (" ✓" if cell.right else ""), fontsize=8, fontweight=weight, parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(not query)
        spine.set_edgecolor(RIGHT if cell.right else WRONG)
        spine.set_linewidth(3 if cell.right else 0.8)


def _picture(title: str, rows: list[Row]) -> bytes:
    from matplotlib.figure import Figure

    columns = 1 + max((len(row.matches) for row in rows), default=0)
    size = (CELL_INCHES * columns + 0.3, (CELL_INCHES + 0.25) * max(len(rows), 1) + 0.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(drawable(title), fontsize=11, parse_math=False)
    grid = figure.subplots(max(len(rows), 1), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, line in zip(rows, grid, strict=False):
        for number, (cell, axes) in enumerate(zip([row.query, *row.matches], line, strict=False)):
            axes.set_axis_on()
            _draw(axes, cell, number == 0)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def draw_sheet(form: str, title: str, rows: list[Row]) -> bytes:
    """The content of the sheet's file, in one of FORMS.

    Raises:
        UsageError: an image that cannot be read.
    """
    return _page(title, rows) if form == ".html" else _picture(title, rows)
