"""`gssf-triton search`: the best matches of every query, as a table and as a sheet to look at."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from gssf_triton.command.files import load_features, load_images, load_labels, load_texts
from gssf_triton.command.metric import add_metric, as_tensor, load_metric
from gssf_triton.command.results import (
    add_output,
    as_csv,
    as_json,
    bar_wanted,
    check_output,
    form_of,
    note,
    replace_file,
    write_results,
)
from gssf_triton.command.sheet import FORMS, Cell, Row, check_requirements, draw_sheet
from gssf_triton.command.usage import Help, UsageError, positive, refusals
from gssf_triton.retrieval import topk
from gssf_triton.retrieval.finite import warn_of_bad_rows

T = TypeVar("T")

DEFAULT_K = 10

DESCRIPTION = """\
The k gallery rows most similar to each query: exact, equal scores by the lower index. The gallery may be larger than
memory. The results hold indices and scores, and whatever ids, images and texts are given.
"""
EXAMPLES = """\
examples:
  gssf-triton search queries.npy gallery.npy --weights metric.npz -k 10 --out found.csv
  gssf-triton search images.npy images.npy --weights metric.npz --exclude-self --images images/ --sheet best.html
  gssf-triton search texts.npy images.npy --weights metric.npz --transpose \\
      --query-texts captions.txt --images files.txt --sheet best.png
"""


class Shown:
    """What is known of the rows of one side: image files, texts and ids, each optional."""

    def __init__(self, args: argparse.Namespace, side: str, rows: int) -> None:
        prefix, of = ("query_", "QUERIES") if side == "query" else ("", "GALLERY")

        def given(name: str, load: Callable[[str, Path, int, str], T]) -> T | None:
            source: Path | None = getattr(args, name)
            return None if source is None else load("--" + name.replace("_", "-"), source, rows, of)

        self.images = given(f"{prefix}images", load_images)
        self.texts = given(f"{prefix}texts", load_texts)
        ids = given(f"{side}_ids", load_labels)
        self.ids: list[int] | None = None if ids is None else ids.tolist()

    @property
    def visible(self) -> bool:
        return self.images is not None or self.texts is not None

    @property
    def columns(self) -> dict[str, Sequence[Any]]:
        """What is given, by name."""
        paths = None if self.images is None else [str(path) for path in self.images]
        named: dict[str, Sequence[Any] | None] = {"id": self.ids, "image": paths, "text": self.texts}
        return {name: values for name, values in named.items() if values is not None}

    def cell(self, row: int, caption: str, right: bool | None = None) -> Cell:
        image = None if self.images is None else self.images[row]
        return Cell(image, None if self.texts is None else self.texts[row], caption, right)


def _check_sheet(args: argparse.Namespace, gallery: Shown, images: list[Path]) -> None:
    if args.sheet is None:
        return
    if args.sheet.suffix.lower() not in FORMS:
        raise UsageError(f"--sheet: expected a name that ends in {' or '.join(FORMS)}, got {args.sheet}")
    if not gallery.visible:
        raise UsageError("--sheet: expected --images or --texts, what the gallery's rows look like")
    check_output(args, "--sheet", images)
    check_requirements(args.sheet.suffix.lower())
    if args.out is not None and os.path.realpath(args.out) == os.path.realpath(args.sheet):
        raise UsageError(f"--sheet: {args.sheet} is --out's file")


def run(args: argparse.Namespace) -> int:
    check_output(args)
    queries, gallery = load_features("QUERIES", args.queries), load_features("GALLERY", args.gallery)
    if os.path.samefile(args.queries, args.gallery) and not (args.query_images or args.query_texts):
        args.query_images, args.query_texts = args.images, args.texts
    if args.exclude_self and len(queries) != len(gallery):
        raise UsageError(
            f"--exclude-self: expected QUERIES and GALLERY of one length, got {len(queries)} and {len(gallery)} rows"
        )
    found_gallery, found_queries = Shown(args, "gallery", len(gallery)), Shown(args, "query", len(queries))
    images = [*(found_gallery.images or ()), *(found_queries.images or ())]
    check_output(args, "--out", images)
    _check_sheet(args, found_gallery, images)
    metric = load_metric(args, queries, transpose=args.transpose)
    with refusals():
        values, indices = topk(
            as_tensor(queries, metric.device),
            gallery,
            k=min(DEFAULT_K, len(gallery)) if args.k is None else args.k,
            exclude=torch.arange(len(queries), device=metric.device) if args.exclude_self else None,
            progress=bar_wanted(args),
            **metric.options,
        )
    if not bool(values[indices >= 0].isfinite().all()):
        warn_of_bad_rows(1, QUERIES=queries, GALLERY=gallery)
    found = [
        [(index, value) for index, value in zip(*row, strict=True) if index >= 0]
        for row in zip(indices.tolist(), values.tolist(), strict=True)
    ]
    write_results(args, _text(form_of(args), found, found_queries, found_gallery))
    if args.sheet is not None:
        shown = [row[: args.sheet_matches] for row in found[: args.sheet_queries]]
        some = _sheet_rows(shown, found_queries, found_gallery)
        title = f"{args.queries.name} in {args.gallery.name}, {'cosine' if args.cosine else args.weights.name}"
        replace_file("--sheet", args.sheet, draw_sheet(args.sheet.suffix.lower(), title, some))
        note(args, f"sheet: {args.sheet}")
    return 0


def _text(form: str, found: list[list[tuple[int, float]]], queries: Shown, gallery: Shown) -> str:
    """The results of every query: a list of objects, or a line a match."""
    asked, known = queries.columns, gallery.columns

    def of(columns: dict[str, Sequence[Any]], row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in columns.items()}

    if form == "json":
        return as_json(
            [
                {
                    "query": query,
                    **of(asked, query),
                    "matches": [{"index": index, "score": score, **of(known, index)} for index, score in row],
                }
                for query, row in enumerate(found)
            ]
        )
    header = ["query", *(f"query_{name}" for name in asked), "rank", "index", "score", *known]
    lines = (
        [query, *of(asked, query).values(), rank, index, score, *of(known, index).values()]
        for query, row in enumerate(found)
        for rank, (index, score) in enumerate(row, start=1)
    )
    return as_csv(header, lines)


def _sheet_rows(found: list[list[tuple[int, float]]], queries: Shown, gallery: Shown) -> list[Row]:
    asked, known = queries.ids, gallery.ids
    rows = []
    for query, row in enumerate(found):
        cells = []
        for index, score in row:
            right = None if asked is None or known is None else asked[query] == known[index]
            cells.append(gallery.cell(index, f"{index}: {score:.3f}", right))
        rows.append(Row(queries.cell(query, f"query {query}"), cells))
    return rows


def add_search(commands: Any) -> None:
    command = commands.add_parser(
        "search",
        help="the best matches of every query, and a sheet of them",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    command.set_defaults(run=run, prog=command.prog)
    command.add_argument("queries", type=Path, metavar="QUERIES", help="query features, .npy (Q, D)")
    command.add_argument("gallery", type=Path, metavar="GALLERY", help="gallery features, .npy (N, D)")
    command.add_argument("-k", type=positive(int), metavar="K", help="matches a query (default: 10, or all there are)")
    command.add_argument("--exclude-self", action="store_true", help="QUERIES is GALLERY: no row finds itself")
    command.add_argument(
        "--transpose",
        action="store_true",
        help="the queries are the metric's right side (texts, if images are its left)",
    )
    for side, rows in (("query", "(Q,)"), ("gallery", "(N,)")):
        command.add_argument(f"--{side}-ids", type=Path, metavar="NPY", help=f"integers {rows}; equal ones match")
    add_metric(command)
    add_output(command)
    group = command.add_argument_group("sheet of the best matches")
    group.add_argument("--sheet", type=Path, metavar="FILE", help="a page (.html) or a picture (.png) to look at")
    for prefix, of in (("--", "gallery"), ("--query-", "queries")):
        text = f"image files of the {of}, one a line, or sorted by name"
        group.add_argument(f"{prefix}images", type=Path, metavar="LIST|FOLDER", help=text)
        group.add_argument(f"{prefix}texts", type=Path, metavar="LIST", help=f"texts of the {of}, one a line")
    group.add_argument("--sheet-queries", type=positive(int), default=20, metavar="N", help="the first N queries (20)")
    group.add_argument("--sheet-matches", type=positive(int), default=10, metavar="N", help="the first N matches (10)")
