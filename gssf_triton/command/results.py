"""Writing results: JSON or CSV, to standard output or to a file that is replaced in one step."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gssf_triton import console
from gssf_triton.command import usage
from gssf_triton.command.usage import UsageError
from gssf_triton.storage import replacing

FORMATS = ("json", "csv")
#: What a formula begins with in a spreadsheet; the last four are the full-width = + - @.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the results there (default: standard output)")
    group.add_argument("--format", choices=FORMATS, help="default: as --out's name says, else json")
    group.add_argument("--quiet", action="store_true", help="no progress bar, no notes")


def check_output(args: argparse.Namespace, option: str = "--out", inputs: Iterable[Path] = ()) -> None:
    """Check, before the work, that the results can be written.

    No file that the command reads may be overwritten: none of its arguments, none of `inputs`.
    """
    path: Path | None = getattr(args, option.lstrip("-"))
    if path is None:
        if option == "--out" and sys.__stdout__ is None:
            raise UsageError("--out: expected a file's name, for standard output is closed")
        return
    if not os.path.isdir(path.parent):
        raise UsageError(f"{option}: {path.parent} is no folder to write in")
    given = [value for name, value in vars(args).items() if isinstance(value, Path) and name not in ("out", "sheet")]
    usage.check_output(option, path, *given, *inputs)


def form_of(args: argparse.Namespace) -> str:
    """The format asked for, else that of --out's suffix, else JSON."""
    ending = args.out.suffix.lstrip(".").lower() if args.out else ""
    return str(args.format or (ending if ending in FORMATS else FORMATS[0]))


def as_json(results: Any) -> str:
    """Results as JSON; numbers that are not finite become null."""

    def clean(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: clean(value) for name, value in x.items()}
        if isinstance(x, list):
            return [clean(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(clean(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _cell(value: Any) -> Any:
    """A text that a spreadsheet shows as it is: ' before what it would compute, and no line break."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")
    return f"'{text}" if any(start.startswith(FORMULA_STARTS) for start in (value, value.lstrip())) else text


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def replace_file(option: str, path: Path, content: bytes) -> None:
    """Replace a file whole, or not at all."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as fault:
        raise UsageError(f"{option}: {path} cannot be written ({fault.strerror})") from None


def write_results(args: argparse.Namespace, text: str) -> None:
    if args.out is not None:
        # A lone surrogate, from a file name that is not UTF-8, is written \udcff, which is valid JSON.
        replace_file("--out", args.out, text.encode(errors="backslashreplace"))
        note(args, f"results: {args.out}")
        return
    if form_of(args) == "json" and not console.knows_unicode():
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as fault:
        console.give_up_output()
        raise UsageError(f"standard output cannot be written ({fault.strerror})") from None


def note(args: argparse.Namespace, text: str) -> None:
    """Print a line about the work, unless --quiet."""
    if not args.quiet:
        console.say(text, args.out)


def bar_wanted(args: argparse.Namespace) -> bool:
    """Whether to show a progress bar: on a terminal, if tqdm is installed."""
    if args.quiet or not sys.stderr.isatty() or console.leads_to(sys.stderr, args.out):
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        note(args, 'no progress bar: it needs tqdm (pip install "gssf_triton[command]")')
        return False
    return True
