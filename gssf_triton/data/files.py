"""What the readers share: lines and files that are looked at before they are trusted, and the errors about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gssf_triton.options import check_path


class DataError(ValueError):
    """A data set's file is truncated, malformed or at odds with another; names the file, the line and what was wanted.

    A file or folder that is not there raises FileNotFoundError.
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
    """The error about one line of a file, or about all of it where `line` is None."""
    where = f"{path}" if line is None else f"{path}, line {line}"
    return DataError(f"{where}: expected {expected}, got {got}")


def existing_folder(root: str | Path, usual_name: str, holds: str) -> Path:
    """`root` itself, or the folder of the data set's usual name in it: the one that has `holds`."""
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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    return path


def numbered_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """(1-based number, text without its surrounding space) of each line; no line may be blank or anything but UTF-8.

    Raises:
        FileNotFoundError: no such file.
        DataError: a blank or undecodable line, or no line at all.
    """
    number = 0
    with existing_file(path, what).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise fault(path, number, f"{what} in UTF-8", f"bytes that are not ({error.reason})") from None
            if not text:
                raise fault(path, number, what, "a blank line")
            yield number, text
    if number == 0:
        raise fault(path, None, what, "an empty file")


def fields_of(path: Path, number: int, text: str, names: str) -> list[str]:
    """The fields of a line, as many as `names` has words; the last one may hold spaces."""
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
    # isascii: int() and isdecimal() take every script's digits.
    if not (text.isascii() and text.isdecimal()):
        raise fault(path, number, expected, repr(text))
    value = int(text)
    if value < smallest or (largest is not None and value > largest):
        raise fault(path, number, expected, text)
    return value


def image_file(path: Path, number: int, image: Path) -> Path:
    """An image that a line of `path` names: there, and not empty."""
    try:
        size = image.stat().st_size if image.is_file() else None
    except OSError as error:
        raise fault(path, number, "an image file's path", f"{image} ({error.strerror})") from None
    if size is None:
        raise fault(path, number, "the path of an image file", f"{image}, which does not exist")
    if size == 0:
        raise fault(path, number, "the path of an image file", f"{image}, which is empty")
    return image
