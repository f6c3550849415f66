"""Rows that are no numbers: `gssf-triton` says how many there are and which is the first, in a line, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.reference import features

from gssf_triton.command import main

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 images and texts of which one, 17, is not a number; 50 queries of which two are infinite."""
    monkeypatch.chdir(tmp_path)
    images, texts, queries = (features(n, 16).numpy() for n in (60, 60, 50))
    texts[:] = images + 0.1 * texts
    np.save("images.npy", images)
    np.save("clean.npy", texts)
    texts[17, 3], queries[[8, 30]] = np.nan, np.inf
    np.save("texts.npy", texts)
    np.save("queries.npy", queries)
    np.save("ids.npy", np.arange(60, dtype=np.int16))
    return tmp_path


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """(results, lines said beside them)."""
    assert main([*argv, "--cosine", "--quiet"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err.splitlines()


def test_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, said = run("evaluate", "image-text", "images.npy", "texts.npy", capsys=capsys)
    line = "NaN or infinity, the first is 17: NaN ranks before every number"
    assert said == [f"gssf-triton evaluate image-text: warning: 1 of the 60 rows of texts holds {line}"]
    # The NaN comes first for every image but its own.
    assert isinstance(found, dict) and found["i2t_r1"] == pytest.approx(100 / 60)
    clean, said = run("evaluate", "image-text", "images.npy", "clean.npy", capsys=capsys)
    assert isinstance(clean, dict) and clean["i2t_r1"] > 90 and said == []
    _, said = run("evaluate", "retrieval", "texts.npy", "--labels", "ids.npy", capsys=capsys)
    assert said == [f"gssf-triton evaluate retrieval: warning: 1 of the 60 rows of embeddings holds {line}"]
    names = [f"--{side}-{kind}=ids.npy" for side in ("query", "gallery") for kind in ("ids", "cams")]
    _, said = run("evaluate", "reid", "images.npy", "texts.npy", *names, capsys=capsys)
    assert said == [f"gssf-triton evaluate reid: warning: 1 of the 60 rows of gallery holds {line}"]


def test_search(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, said = run("search", "queries.npy", "texts.npy", "-k", "2", capsys=capsys)
    line = "NaN or infinity, the first is"
    assert said == [
        f"gssf-triton search: warning: 2 of the 50 rows of QUERIES hold {line} 8: NaN ranks before every number",
        f"gssf-triton search: warning: 1 of the 60 rows of GALLERY holds {line} 17: NaN ranks before every number",
    ]
    assert isinstance(found, list) and [row["matches"][0]["index"] for row in found if row["query"] not in (8, 30)] == (
        [17] * 48
    )
    _, said = run("search", "images.npy", "clean.npy", "-k", "2", capsys=capsys)
    assert said == []
