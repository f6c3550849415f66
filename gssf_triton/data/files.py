"""What the readers share: checked lines and files, and the errors about them."""

from __future__ import annotations

import codecs
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gssf_triton.checks import check_path

#: The largest int64, the type of ids.
LARGEST = 2**63 - 1


class DataError(ValueError):
    """A data set's file is truncated, malformed or contradicts another; names the file, the line and what was expected.

    A missing file or folder raises FileNotFoundError.
    """


@dataclass(frozen=True)
class LabelledImages:
    """Image files and their classes.

    Attributes:
        paths: The n files.
        labels: (n,) int64, each file's class, numbered as in the data set.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)


def fault(path: Path, line: int | None, expected: str, got: str) -> DataError:
    """The error about one line of a file, or about the whole file if `line` is None."""
    where = f"{path}" if line is None else f"{path}, line {line}"
    return DataError(f"{where}: expected {expected}, got {got}")


def existing_folder(root: str | Path, usual_name: str, holds: str) -> Path:
    """`root`, or the folder `usual_name` in it: the first that contains `holds`."""
    check_path("root", root)
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected the {usual_name} data set there")
    for folder in (root, root / usual_name):
        if (folder / holds).exists():
            return folder
    raise FileNotFoundError(
        f"{root / holds}: not found, nor in {root / usual_name}; expected the {usual_name} data set"
    )


def existing_file(path: Path, what: str) -> Path:
    if not os.path.isfile(path):
        found = "no file" if os.path.exists(path) else "no such file"
        raise FileNotFoundError(f"{path}: {found}; expected {what}")
    return path


def visible_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """A folder's files with these suffixes, in either case, sorted by name, without hidden ones (macOS's `._a.jpg`)."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")
    )


def inside(path: Path, number: int, folder: Path, name: str) -> Path:
    """The file in `folder` that a line of a data set's list names; names that lead out of it are refused.

    Links in the folder may lead anywhere: the user made them.
    """
    if Path(name).anchor or ".." in Path(name).parts:
        raise fault(path, number, f"the path of a file in {folder}", f"{name!r}, which may lie outside it")
    return folder / name


def numbered_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """(1-based number, stripped text) of each line, all of them UTF-8 and none blank.

    A byte order mark at the start is skipped.

    Raises:
        FileNotFoundError: no such file.
        DataError: a blank or undecodable line, or no line at all.
    """
    number = 0
    with existing_file(path, what).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode().strip()
            except UnicodeDecodeError as error:
                raise fault(path, number, f"{what} in UTF-8", f"bytes that are not ({error.reason})") from None
            if not text:
                raise fault(path, number, what, "a blank line")
            yield number, text
    if number == 0:
        raise fault(path, None, what, "an empty file")


def fields_of(path: Path, number: int, text: str, names: str) -> list[str]:
    """The fields of a line, one for each word of `names`; the last one may contain spaces."""
    wanted = len(names.split())
    fields = text.split(maxsplit=wanted - 1)
    if len(fields) != wanted:
        raise fault(path, number, f"{wanted} fields '{names}'", f"{len(fields)}: {text!r}")
    return fields


def whole_number(path: Path, number: int, name: str, text: str, smallest: int, largest: int | None = None) -> int:
    """A field that is an integer from `smallest` to `largest`."""
    expected = f"{name}, an integer of at least {smallest}"
    if largest is not None:
        expected = f"{name}, an integer from {smallest} to {largest}"
    # isascii: int() and isdecimal() accept the digits of all scripts.
    if not (text.isascii() and text.isdecimal()):
        raise fault(path, number, expected, repr(text))
    digits = text.lstrip("0") or "0"
    # int() refuses thousands of digits.
    if len(digits) > len(str(LARGEST)) or int(digits) > LARGEST:
        shown = text if len(text) <= 40 else f"{text[:20]}…, {len(text)} digits"
        raise fault(path, number, f"{name}, an integer from {smallest} to {largest or LARGEST}", shown)
    value = int(digits)
    if value < smallest or (largest is not None and value > largest):
        raise fault(path, number, expected, text)
    return value


def image_file(path: Path, number: int | None, image: Path) -> Path:
    """The image that a line of `path` names, or that lies in the folder `path`, checked to be a file and not empty."""
    try:
        size = image.stat().st_size if image.is_file() else None
        exists = size is not None or image.exists()
    except OSError as error:
        raise fault(path, number, "an image file's path", f"{image} ({error.strerror})") from None
    if size is None:
        found = "is no file" if exists else "does not exist"
        raise fault(path, number, "the path of an image file", f"{image}, which {found}")
    if size == 0:
        raise fault(path, number, "the path of an image file", f"{image}, which is empty")
    return image
