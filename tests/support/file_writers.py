"""Processes that write the package's, the examples' and the benchmark's files, for test_concurrency.py."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "perf")]

import study_data  # noqa: E402
from checkpoints import save_checkpoint  # noqa: E402
from study_runner import Results  # noqa: E402

from bench import results  # noqa: E402
from gssf_triton.data import Glyphs, glyphs  # noqa: E402
from gssf_triton.integrations.arrays import load_arrays, save_arrays  # noqa: E402

LETTERS = ("A", "B")


def some_glyphs(letter: str) -> Glyphs:
    images, ids = np.full((300, 32, 32), ord(letter), np.uint8), np.arange(300)
    return Glyphs(images, ids, ids * 0, tuple(f"{letter} {i}" for i in range(300)), (letter,))


def write_glyphs(path: Path, letter: str) -> None:
    glyphs._write(path, some_glyphs(letter))


def read_glyphs(path: Path) -> str:
    found = glyphs._read(path)
    assert len(found) == 300 and (found.images == ord(found.typefaces[0])).all()
    return found.typefaces[0]


def write_checkpoint(path: Path, letter: str) -> None:
    save_checkpoint(path, {"identity": {"run": letter}, "x": torch.full((50_000,), float(ord(letter)))})


def read_checkpoint(path: Path) -> str:
    state = torch.load(path, weights_only=True)
    assert (state["x"] == ord(state["identity"]["run"])).all()
    return str(state["identity"]["run"])


def write_arrays(path: Path, letter: str) -> None:
    save_arrays(path, W_diag=torch.full((50_000,), float(ord(letter))))


def read_arrays(path: Path) -> str:
    (value,) = set(load_arrays(path)["W_diag"].tolist())
    return chr(int(value))


def write_run(path: Path, letter: str) -> None:
    results.write(path, dict.fromkeys(results.RUN, letter * 1000) | {"schema": 1})


def read_run(path: Path) -> str:
    (value,) = set(results.read(path)["suite"])
    return str(value)


def write_study(path: Path, letter: str) -> None:
    Results(path, {"header": letter * 1000}).add({"column": letter, "seed": 0})


def read_study(path: Path) -> str:
    return str(json.loads(path.read_text("utf-8"))["runs"][0]["column"])


#: File name → (writes one of two contents whole, tells which of them a file is).
WRITERS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], str]]] = {
    "glyphs.npz": (write_glyphs, read_glyphs),
    "run.pt": (write_checkpoint, read_checkpoint),
    "metric.npz": (write_arrays, read_arrays),
    "metric.safetensors": (write_arrays, read_arrays),
    "run.json": (write_run, read_run),
    "study.json": (write_study, read_study),
}


def write_for_ever(letter: str, folder: str) -> None:
    """Write every file over and over, in an order of the process's own."""
    names = list(WRITERS)
    random.Random(os.getpid()).shuffle(names)
    while True:
        for name in names:
            WRITERS[name][0](Path(folder) / name, letter)


def load_from_one_cache(number: str, folder: str) -> None:
    """Take the glyphs and two photographs from one cache, as soon as the other processes do, and say what came."""
    os.environ["GSSF_CACHE_DIR"] = folder
    warnings.simplefilter("ignore", UserWarning)  # of a broken cache, by whichever process met it
    glyphs.render = lambda progress=True: some_glyphs("A")  # type: ignore[assignment]
    start = Path(folder) / "start"
    while not start.exists():
        time.sleep(0.001)
    found = glyphs.load_glyphs(progress=False)
    pictures = tuple(Path(folder) / f"{name}.png" for name in "ab")
    photographs = study_data.photographs(pictures, Path(folder))
    assert found.typefaces == ("A",) and (found.images == ord("A")).all()
    assert [photographs[i].reshape(-1, 3).mean(0).tolist() for i in range(2)] == [[0, 100, 200], [1, 100, 200]]
