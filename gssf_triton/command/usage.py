"""What the package's command lines share: errors of one line, help, devices and numbers as arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from gssf_triton.storage import check_target


class UsageError(Exception):
    """Bad usage or bad input, described in one line."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turns a ValueError of the package's checks into a UsageError."""
    try:
        yield
    except ValueError as fault:
        raise UsageError(str(fault)) from fault


def check_output(option: str, path: Path, *inputs: Path | None) -> None:
    """Check, before the work, that an output can be written and is none of the inputs."""
    try:
        check_target(path, *inputs)
    except OSError as fault:
        raise UsageError(f"{option}: {fault.filename} {fault.strerror}") from None
    except ValueError as fault:
        raise UsageError(f"{option}: {fault}") from None


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples; options in one column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


class Parser(argparse.ArgumentParser):
    """Bad usage is one clear line, not a page of usage, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"--device: {text!r} is no device; cpu, cuda or cuda:1, say") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device: no GPU is to be seen here")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"--device: there is no {text}, only {torch.cuda.device_count()} GPU(s)")
        return torch.device("cuda", index)
    if device.type != "cpu":
        raise UsageError(f"--device: {text!r} is not supported; cpu or cuda")
    return device


def positive(convert: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type: a number above 0."""

    def number(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return number
