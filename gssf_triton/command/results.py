"""Where results go: JSON or CSV, to standard output or to a file that is replaced in one step."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gssf_triton.command.usage import UsageError
from gssf_triton.storage import replacing

FORMATS = ("json", "csv")


def add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the results there (default: standard output)")
    group.add_argument("--format", choices=FORMATS, help="default: as --out's name says, else json")
    group.add_argument("--quiet", action="store_true", help="no progress bar, no notes")


def check_target(option: str, path: Path | None) -> None:
    """Said before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option}: {path} is a folder; expected a file's name")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: {path.parent} is no folder to write in")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option}: {path.parent} cannot be written in")


def form_of(args: argparse.Namespace) -> str:
    """The format asked for, or that of --out's ending."""
    ending = args.out.suffix.lstrip(".").lower() if args.out else ""
    return str(args.format or (ending if ending in FORMATS else FORMATS[0]))


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(results: Any) -> str:
    """Results with what is not finite as null."""

    def clean(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: clean(value) for name, value in x.items()}
        return [clean(value) for value in x] if isinstance(x, list) else _plain(x)

    return json.dumps(clean(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def as_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def replace_file(option: str, path: Path, content: bytes) -> None:
    """Whole, or not at all."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as fault:
        raise UsageError(f"{option}: {path} cannot be written ({fault.strerror})") from None


def write_results(args: argparse.Namespace, text: str) -> None:
    if args.out is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        replace_file("--out", args.out, text.encode())
        note(args, f"results: {args.out}")


def note(args: argparse.Namespace, text: str) -> None:
    """A line for whoever sits before the screen."""
    if not args.quiet:
        print(text, file=sys.stderr)


def bar_wanted(args: argparse.Namespace) -> bool:
    """A progress bar is for a terminal, and needs tqdm."""
    if args.quiet or not sys.stderr.isatty():
        return False
    try:
        import tqdm  # noqa: F401
    except ImportError:
        note(args, 'no progress bar: it needs tqdm (pip install "gssf_triton[command]")')
        return False
    return True
