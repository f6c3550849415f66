"""`gssf-triton`: the package's own answers as JSON and CSV, sheets to look at, one clear line for every misuse."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.reference import features, weights

import gssf_triton
from gssf_triton.command import main, results

N, D = 12, 8
IDS = torch.arange(N) // 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features, ids, a metric and images: `x` are images, `y` two captions each."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", features(N, D).numpy())
    np.save("y.npy", features(2 * N, D).numpy())
    np.save("ids.npy", IDS.numpy())
    np.save("cams.npy", torch.arange(N).remainder(2).to(torch.int32).numpy())
    metric = weights("diag+blocks", 2, 4)
    np.savez("metric.npz", **{name: w.numpy() for name, w in metric.items() if w is not None})
    Path("images").mkdir()
    for i in range(N):
        Image.new("RGB", (40 + i, 30), (20 * i, 100, 50)).save(f"images/{i:02d}.png")
    names = "".join(f"images/{i:02d}.png\n" for i in range(N))
    Path("list.txt").write_text(names)
    Path("captions.txt").write_text("".join(f"caption {i}: <b> costs $5 & ünïcode\n" for i in range(2 * N)), "utf-8")
    return tmp_path


def read(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(name))


def metric(transpose: bool = False) -> dict[str, torch.Tensor]:
    with np.load("metric.npz") as file:
        found = {name: torch.from_numpy(file[name]) for name in file}
    return found | ({"W_blocks": found["W_blocks"].mT} if transpose else {})


def call(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that makes sense prints."""
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


# ---------------------------------------------------------------- evaluate


def expected_metrics(protocol: str) -> dict[str, float]:
    x = read("x.npy")
    if protocol == "image-text":
        ids = torch.arange(N)
        return gssf_triton.metrics.image_text(
            x, read("y.npy"), **metric(), image_ids=ids, text_ids=ids.repeat_interleave(2), ks=(1, 3), folds=2
        )
    if protocol == "reid":
        cams = read("cams.npy")
        names = {"query_ids": IDS, "gallery_ids": IDS, "query_cams": cams, "gallery_cams": cams}
        return gssf_triton.metrics.reid(x, x, **metric(), **names, normalize=False)
    return gssf_triton.metrics.retrieval(x, IDS, torch.ones(D))


PROTOCOLS = {
    "image-text": ["image-text", "x.npy", "y.npy", "--weights", "metric.npz", "--ks", "1", "3", "--folds", "2"],
    "reid": [
        *("reid", "x.npy", "x.npy", "--weights", "metric.npz", "--raw", "--query-ids", "ids.npy"),
        *("--gallery-ids", "ids.npy", "--query-cams", "cams.npy", "--gallery-cams", "cams.npy"),
    ],
    "retrieval": ["retrieval", "x.npy", "--labels", "ids.npy", "--cosine"],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_evaluate(protocol: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = expected_metrics(protocol)
    argv = ["evaluate", *PROTOCOLS[protocol]]
    assert json.loads(call(*argv, capsys=capsys)) == expected
    assert call(*argv, "--quiet", "--out", "found.csv", capsys=capsys) == ""
    (header, *rows) = csv.reader(io.StringIO((folder / "found.csv").read_text()))
    assert header == ["metric", "value"] and {name: float(value) for name, value in rows} == expected


def test_ids_of_images_and_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("text_ids.npy", torch.randint(0, 4, (2 * N,)).numpy())
    given = ("--image-ids", "ids.npy", "--text-ids", "text_ids.npy")
    found = call("evaluate", "image-text", "x.npy", "y.npy", "--weights", "metric.npz", *given, capsys=capsys)
    assert json.loads(found) == gssf_triton.metrics.image_text(
        read("x.npy"), read("y.npy"), **metric(), image_ids=IDS, text_ids=read("text_ids.npy")
    )


def test_what_no_query_has_is_null(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("lone.npy", np.arange(N))
    found = json.loads(call("evaluate", "retrieval", "x.npy", "--labels", "lone.npy", "--cosine", capsys=capsys))
    assert found["map_at_r"] is None and found["r1"] == 0


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("transpose", [False, True], ids=["as-is", "transposed"])
def test_search(transpose: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries, gallery = ("y.npy", "x.npy") if transpose else ("x.npy", "y.npy")
    argv = ["search", queries, gallery, "--weights", "metric.npz", "-k", "5", *["--transpose"] * transpose]
    values, indices = gssf_triton.topk(read(queries), read(gallery), **metric(transpose), k=5, normalize=True)
    found = json.loads(call(*argv, capsys=capsys))
    assert [row["query"] for row in found] == list(range(len(values)))
    assert [[match["index"] for match in row["matches"]] for row in found] == indices.tolist()
    assert [[match["score"] for match in row["matches"]] for row in found] == values.tolist()
    (header, *rows) = csv.reader(io.StringIO(call(*argv, "--format", "csv", capsys=capsys)))
    assert header == ["query", "rank", "index", "score"]
    assert [int(row[2]) for row in rows] == indices.flatten().tolist()
    assert [int(row[1]) for row in rows] == list(range(1, 6)) * len(values)


def test_search_within_one_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No row finds itself; what is known of a row stands beside it."""
    np.save("few.npy", np.load("x.npy")[:4])
    np.save("few_ids.npy", np.arange(4))
    argv = ["search", "few.npy", "few.npy", "--cosine", "--exclude-self", "--format", "csv"]
    argv += ["--gallery-ids", "few_ids.npy", "--query-ids", "few_ids.npy"]
    rows = list(csv.DictReader(io.StringIO(call(*argv, capsys=capsys))))
    assert len(rows) == 12  # k is 10 at most; of 4 items 3 are left
    assert all(row["query"] != row["index"] and row["query_id"] == row["query"] and row["id"] for row in rows)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_features_of_other_dtypes(dtype: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("x.npy", np.load("x.npy").astype(dtype))
    values, _ = gssf_triton.topk(read("x.npy"), read("x.npy"), **metric(), k=2, normalize=True)
    found = json.loads(call("search", "x.npy", "x.npy", "--weights", "metric.npz", "-k", "2", capsys=capsys))
    assert [[match["score"] for match in row["matches"]] for row in found] == values.tolist()


class Tags(html.parser.HTMLParser):
    """The tags of a page and its text; complains of what is left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.text, self.open = "", 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        self.open += tag not in ("meta", "img")

    def handle_endtag(self, tag: str) -> None:
        self.open -= 1

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_of_matches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["search", "x.npy", "x.npy", "--weights", "metric.npz", "--exclude-self", "-k", "6", "--out", "found.json"]
    argv += ["--query-ids", "ids.npy", "--gallery-ids", "ids.npy", "--images", "images", "--texts", "captions.txt"]
    (folder / "captions.txt").write_text("".join(f"caption {i}: <b> & ü\n" for i in range(N)), "utf-8")
    call(*argv, "--sheet", "a.html", "--sheet-queries", "3", "--sheet-matches", "4", "--quiet", capsys=capsys)
    page = Tags((folder / "a.html").read_text("utf-8"))
    assert page.open == 0
    kinds = [a["class"] for tag, a in page.found if tag == "figure"]
    matches = [[match["index"] for match in row["matches"]][:4] for row in json.loads(Path("found.json").read_text())][
        :3
    ]
    assert kinds == [
        kind
        for query, row in enumerate(matches)
        for kind in ("query", *("right" if IDS[query] == IDS[i] else "match" for i in row))
    ]
    pictures = [a for tag, a in page.found if tag == "img"]
    assert [a["alt"] for a in pictures] == [f"{i:02d}.png" for query, row in enumerate(matches) for i in (query, *row)]
    assert all(a["src"].startswith("data:image/jpeg;base64,") for a in pictures)  # one file, nothing beside it
    assert page.text.count("<b> & ü") == 15


def test_a_picture_of_matches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions find images: the colours of the images found are in it."""
    argv = [
        "search",
        "y.npy",
        "x.npy",
        "--weights",
        "metric.npz",
        "--transpose",
        "-k",
        "3",
        "--quiet",
        "--format",
        "csv",
    ]
    argv += ["--query-texts", "captions.txt", "--images", "list.txt", "--sheet", "a.PNG", "--sheet-queries", "2"]
    rows = list(csv.DictReader(io.StringIO(call(*argv, capsys=capsys))))
    assert (
        rows[0]["query_text"].startswith("caption 0") and rows[0]["image"] == f"images/{int(rows[0]['index']):02d}.png"
    )
    with Image.open("a.PNG") as picture:
        assert picture.format == "PNG" and picture.width > 300
        colours = {colour[:3] for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(20 * int(row["index"]), 100, 50) for row in rows[:6]} <= colours


# ---------------------------------------------------------------- misuse


def put(name: str, make: Callable[[], object]) -> Callable[[], object]:
    return lambda: np.save(name, make())


def nothing() -> None:
    """Everything is as it should be on disk."""


RETRIEVAL = "evaluate retrieval x.npy --labels ids.npy"
SEARCH = "search x.npy x.npy --weights metric.npz"
SHEET = f"{SEARCH} --images images --sheet a.png"

#: (command, what is wrong on disk, what the line says).
MISUSE: dict[str, tuple[str, Callable[[], object], str]] = {
    "no-command": ("", nothing, "the following arguments are required: COMMAND"),
    "unknown-command": ("find", nothing, "invalid choice: 'find'"),
    "no-protocol": ("evaluate", nothing, "required: PROTOCOL"),
    "no-metric": (RETRIEVAL, nothing, "one of the arguments --weights --cosine is required"),
    "two-metrics": (f"{RETRIEVAL} --cosine --weights metric.npz", nothing, "not allowed with argument"),
    "no-labels": ("evaluate retrieval x.npy --cosine", nothing, "required: --labels"),
    "no-file": ("search no.npy x.npy --cosine", nothing, "QUERIES: no.npy: no such file; expected an .npy"),
    "folder": ("search x.npy images --cosine", nothing, "GALLERY: images: a folder; expected an .npy"),
    "no-array": ("search x.npy list.txt --cosine", nothing, "GALLERY: list.txt: .* NumPy cannot read"),
    "archive": ("search metric.npz x.npy --cosine", nothing, "QUERIES: metric.npz: .* got an .npz archive"),
    "cut-short": (
        f"{RETRIEVAL} --cosine",
        lambda: Path("x.npy").write_bytes(Path("x.npy").read_bytes()[:-40]),
        "EMBEDDINGS: x.npy: .* NumPy cannot read",
    ),
    "pickled": (f"{RETRIEVAL} --cosine", put("x.npy", lambda: np.array([{}, 1])), "EMBEDDINGS: x.npy: .* cannot read"),
    "three-d": (f"{RETRIEVAL} --cosine", put("x.npy", lambda: np.ones((2, 3, 4))), r"got float64 of shape \(2, 3, 4\)"),
    "integers": (f"{RETRIEVAL} --cosine", put("x.npy", lambda: np.ones((N, D), int)), "float64, got int64 of shape"),
    "labels-short": (
        f"{RETRIEVAL} --cosine",
        put("ids.npy", lambda: np.arange(3)),
        r"--labels: .* 12 integers.* \(3,\)",
    ),
    "labels-float": (f"{RETRIEVAL} --cosine", put("ids.npy", lambda: np.ones(N)), "--labels: .* got float64"),
    "no-weights": (f"{RETRIEVAL} --weights no.npz", nothing, "--weights: no.npz: no such file"),
    "weights-named-oddly": (f"{RETRIEVAL} --weights list.txt", nothing, "--weights: list.txt: .* must end in .npz"),
    "weights-of-others": (
        f"{RETRIEVAL} --weights metric.npz",
        lambda: np.savez("metric.npz", W=np.ones(3)),
        "--weights: metric.npz: expected .* W_diag .* got W",
    ),
    "weights-broken": (
        f"{RETRIEVAL} --weights metric.npz",
        lambda: Path("metric.npz").write_bytes(b"PK\x03\x04 and no more"),
        "--weights: metric.npz: .* cannot be read",
    ),
    "weights-whole": (
        f"{RETRIEVAL} --weights metric.npz",
        lambda: np.savez("metric.npz", W_diag=np.ones(D, int)),
        "--weights: metric.npz: expected floats in W_diag, got int64",
    ),
    "weights-of-another-D": (
        f"{RETRIEVAL} --weights metric.npz",
        lambda: np.savez("metric.npz", W_diag=np.ones(5, np.float32)),
        r"W_diag must have shape \(8,\), .* got \(5,\)",
    ),
    "two-D": (SEARCH.replace("x.npy x", "x.npy y"), put("y.npy", lambda: np.ones((3, 5), "f4")), "the same D"),
    "two-dtypes": (SEARCH.replace("x.npy x", "x.npy y"), put("y.npy", lambda: np.ones((3, D))), "the same dtype"),
    "one-ids": ("evaluate image-text x.npy y.npy --cosine --image-ids ids.npy", nothing, "go together"),
    "captions": ("evaluate image-text y.npy x.npy --cosine", nothing, "expected equally many captions an image"),
    "folds": ("evaluate image-text x.npy y.npy --cosine --folds 13", nothing, "folds must lie between 1 and 12"),
    "ks": (f"{RETRIEVAL} --cosine --ks 1 0", nothing, "--ks: must be above 0, got 0"),
    "k-large": (f"{SEARCH} -k 13", nothing, "k must lie between 0 and the gallery's 12 items, got 13"),
    "k-word": (f"{SEARCH} -k ten", nothing, "-k: 'ten' is no number"),
    "exclude-self": ("search x.npy y.npy --cosine --exclude-self", nothing, "--exclude-self: .* got 12 and 24 rows"),
    "device": (f"{SEARCH} --device gpu", nothing, "--device: 'gpu' is no device"),
    "out-folder": (f"{SEARCH} --out images", nothing, "--out: images is a folder"),
    "out-nowhere": (f"{SEARCH} --out no/where.json", nothing, "--out: no is no folder"),
    "format": (f"{SEARCH} --format xml", nothing, "invalid choice: 'xml'"),
    "sheet-form": (f"{SEARCH} --images images --sheet a.pdf", nothing, "--sheet: .* ends in .html or .png, got a.pdf"),
    "sheet-of-nothing": (f"{SEARCH} --sheet a.png", nothing, "--sheet: expected --images or --texts"),
    "sheet-is-out": (f"{SEARCH} --images images --sheet a.png --out a.png", nothing, "--sheet: a.png is --out's file"),
    "images-few": (SHEET, lambda: Path("images/03.png").unlink(), "--images: images: expected 12 images.* got 11"),
    "images-none": (f"{SEARCH} --images no.txt --sheet a.png", nothing, "--images: no.txt: no such file"),
    "image-missing": (
        f"{SEARCH} --images list.txt --sheet a.png",
        lambda: Path("images/03.png").unlink(),
        "--images: list.txt, line 4: .* images/03.png, which does not exist",
    ),
    "image-broken": (SHEET, lambda: Path("images/00.png").write_text("none"), "--sheet: images/00.png: .* be read"),
    "texts-many": (f"{SEARCH} --texts captions.txt", nothing, "--texts: captions.txt: expected 12 lines.* got 24"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_one_clear_line(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, break_something, pattern = MISUSE[name]
    break_something()
    try:
        status = main(command.split())
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    (line,) = [line for line in captured.err.splitlines() if not line.startswith("results: ")]
    assert line.startswith("gssf-triton") and re.search(pattern, line), line


def test_triton_where_it_cannot_run(folder: Path) -> None:
    """In a process of its own, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    argv = [sys.executable, "-m", "gssf_triton", *SEARCH.split(), "--backend", "triton", "--device", "cpu"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gssf-triton search: --backend: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("command", ["", "evaluate", "evaluate image-text", "evaluate reid", "search"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and text.startswith(f"usage: gssf-triton {command}".strip())
    assert "examples:" in text or command.startswith("evaluate ")
    assert max(map(len, text.splitlines())) <= 120


def test_examples_in_the_help_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Their options exist: what is wrong with them is that the files are not there."""
    from gssf_triton.command import evaluate, search
    from gssf_triton.command.main import EPILOG

    for text in (EPILOG, evaluate.EXAMPLES, search.EXAMPLES):
        lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("  gssf-triton")]
        assert lines
        for line in lines:
            assert main(line.split()[1:]) == 2
            assert "no such file; expected an .npy" in capsys.readouterr().err


def test_a_bar_on_a_terminal(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(SEARCH.split()) == 0
    assert "topk: 100%" in capsys.readouterr().err
    assert main([*SEARCH.split(), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(SEARCH.split()) == 0
    assert "no progress bar: it needs tqdm" in capsys.readouterr().err


def test_a_file_is_replaced_or_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.json").write_text("old")
    assert main([*SEARCH.split(), "--out", "old.json", "-k", "99"]) == 2
    assert Path("old.json").read_text() == "old"
    assert main([*SEARCH.split(), "--out", "old.json"]) == 0
    assert len(json.loads(Path("old.json").read_text())) == N
    assert not list(folder.glob(".old.json*"))


def test_json_has_no_nan() -> None:
    text = results.as_json({"a": math.nan, "b": [{"c": -math.inf, "d": 1.5}]})
    assert json.loads(text) == {"a": None, "b": [{"c": None, "d": 1.5}]}


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    np.save("many.npy", features(3000, D).numpy())
    command = f"{sys.executable} -m gssf_triton search many.npy many.npy --cosine -k 50 | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[\n" and done.stderr == "" and done.returncode == 0
