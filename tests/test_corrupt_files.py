"""Every file that is read, in every way a file is found broken: a clear error that names it, or set aside and rebuilt.

What each data set's own rules forbid is in test_data_readers.py, and what a tuning cache's, in test_tuner_store.py.
"""

from __future__ import annotations

import json
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tuner_kit import a_chunk, stream_key

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "perf")]

import demo_report  # noqa: E402
import studies  # noqa: E402
import study_data  # noqa: E402
import study_trainer  # noqa: E402
from checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from glyph_training import STATE, Run, Settings, load_teacher, test_pairs  # noqa: E402
from study_runner import RUN, Results  # noqa: E402

from bench import results  # noqa: E402
from gssf_triton.autotune import shapes, tables  # noqa: E402
from gssf_triton.autotune.store import Store  # noqa: E402
from gssf_triton.command import files  # noqa: E402
from gssf_triton.command.usage import UsageError  # noqa: E402
from gssf_triton.data import DataError, Glyphs, glyphs, load_cub200, load_precomputed, load_sop  # noqa: E402
from gssf_triton.integrations.arrays import load_arrays, save_arrays  # noqa: E402
from gssf_triton.kernels.devices import Device  # noqa: E402

test_pairs.__test__ = False  # type: ignore[attr-defined]


class Bomb:
    """Writes a file when it is unpickled: what no reader may do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@dataclass(frozen=True)
class Reader:
    """A reader of one file.

    Attributes:
        make: Writes a whole file, and what lies beside it, into a folder; its path.
        read: Reads it, given that path.
        error: What a broken one costs; a `UserWarning` where the file is set aside or made again.
        kind: What the file holds.
        more: Further contents that it may not have, by name.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    error: type[Exception]
    kind: str
    more: dict[str, bytes] | None = None


def made(name: str, content: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def npy(name: str, array: np.ndarray) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
        return path

    return make


def precomputed(which: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        features = np.random.default_rng().normal(size=(3, 4, 16)).astype(np.float32)
        images = npy("f30k_precomp/dev_ims.npy", features)(folder)
        captions = made("f30k_precomp/dev_caps.txt", "".join(f"caption {i} .\n" for i in range(15)))(folder)
        return images if which == "images" else captions

    return make


def cub(which: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        names = ["001.Albatross/A_1.jpg", "200.Yellowthroat/Y_2.jpg"]
        for name in names:
            made(f"images/{name}", "an image")(folder)
        made("images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))(folder)
        made("image_class_labels.txt", "1 1\n2 200\n")(folder)
        return folder / which

    return make


def sop(which: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for part, line in (("train", "1 1 1 a_final/1_0.JPG"), ("test", "2 9 1 a_final/2_0.JPG")):
            made(line.split()[-1], "an image")(folder)
            made(f"Ebay_{part}.txt", f"image_id class_id super_class_id path\n{line}\n")(folder)
        return folder / which

    return make


def metric(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_arrays(folder / name, W_diag=torch.ones(8), W_blocks=torch.ones(2, 4, 4))
        return folder / name

    return make


def images_list(folder: Path) -> Path:
    made("a.png", "an image")(folder)
    return made("list.txt", "a.png\na.png\n")(folder)


def stored(folder: Path) -> Path:
    Store(DEVICE, folder / "cpu-1.json").add({stream_key(): a_chunk()})
    return folder / "cpu-1.json"


def shipped(folder: Path) -> Path:
    path = stored(folder / "made")
    return made("tables/a.json", path.read_bytes())(folder)


def read_shipped(path: Path) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SHIPPED", path.parent)
        return tables.shipped()


def tiny_glyphs() -> Glyphs:
    images, ids = np.full((50, 32, 32), 255, np.uint8), np.arange(50)
    return Glyphs(images, ids, ids * 0, tuple(f"LETTER {i}" for i in range(50)), ("face",))


def glyph_cache(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSSF_CACHE_DIR", str(folder))
        glyphs._write(glyphs.cache_path(), tiny_glyphs())
        return glyphs.cache_path()


def read_glyph_cache(path: Path) -> Glyphs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSSF_CACHE_DIR", str(path.parent))
        patch.setattr(glyphs, "render", lambda progress=True: tiny_glyphs())
        return glyphs.load_glyphs(progress=False)


def photographs(folder: Path) -> Path:
    from PIL import Image

    paths = tuple(folder / f"{i}.png" for i in range(2))
    for path in paths:
        Image.new("RGB", (5, 5), "red").save(path)
    study_data.photographs(paths, folder / "cache")
    (kept,) = (folder / "cache").iterdir()
    return kept


def read_photographs(path: Path) -> object:
    folder = path.parent.parent
    return study_data.photographs(tuple(folder / f"{i}.png" for i in range(2)), path.parent)


SETTINGS = Settings(steps=2, batch_size=4, dim=8, block_size=4, evaluations=1, held_out=10)


def run(path: Path) -> Run:
    train, test = tiny_glyphs().split(10)
    return Run(SETTINGS, "both", 0, train, test_pairs(test), torch.device("cpu"), path)


def checkpoint(folder: Path) -> Path:
    run(folder / "both-0.pt").save()
    return folder / "both-0.pt"


STUDY_HEADER = {
    "settings": asdict(study_trainer.Settings()),
    "data": "glyphs",
    "held_out": 10,
    "limit": 0,
    "tower_steps": 0,
}


def study_results(folder: Path) -> Path:
    results = Results(folder / "reid.json", STUDY_HEADER)
    results.add(dict.fromkeys(RUN, 1))
    return results.path


def bench_results(folder: Path) -> Path:
    results.write(folder / "run.json", dict.fromkeys(results.RUN, 1))
    return folder / "run.json"


SHAPES = json.dumps([{"M": 4, "N": 4, "D": 8, "B": 4, "dtype": "fp32"}])
FEATURES = np.random.default_rng().normal(size=(6, 8)).astype(np.float32)
DEVICE = Device("cpu-1", "a CPU", "cpu")
DEMO = made("results.json", (ROOT / "examples/figures/results.json").read_bytes())
STUDY = made("reid.json", (ROOT / "examples/results/reid.json").read_bytes())

READERS: dict[str, Reader] = {
    "precomputed features": Reader(
        precomputed("images"), lambda path: load_precomputed(path.parent, "f30k", "dev"), DataError, "npy"
    ),
    "precomputed captions": Reader(
        precomputed("captions"), lambda path: load_precomputed(path.parent, "f30k", "dev"), DataError, "text"
    ),
    "CUB's images": Reader(cub("images.txt"), lambda path: load_cub200(path.parent), DataError, "text"),
    "CUB's classes": Reader(cub("image_class_labels.txt"), lambda path: load_cub200(path.parent), DataError, "text"),
    "SOP's training list": Reader(sop("Ebay_train.txt"), lambda path: load_sop(path.parent), DataError, "text"),
    "SOP's test list": Reader(sop("Ebay_test.txt"), lambda path: load_sop(path.parent), DataError, "text"),
    "a command's features": Reader(
        npy("x.npy", FEATURES), lambda path: files.load_features("--x", path), UsageError, "npy"
    ),
    "a command's labels": Reader(
        npy("ids.npy", np.arange(6)), lambda path: files.load_labels("--ids", path, 6, "X"), UsageError, "npy"
    ),
    "a command's weights": Reader(
        metric("metric.npz"), lambda path: files.load_weights("--weights", path), UsageError, "npz"
    ),
    "a command's safetensors": Reader(
        metric("metric.safetensors"), lambda path: files.load_weights("--weights", path), UsageError, "safetensors"
    ),
    "a command's texts": Reader(
        made("texts.txt", "one\ntwo\n"), lambda path: files.load_texts("--texts", path, 2, "X"), UsageError, "text"
    ),
    "a command's list of images": Reader(
        images_list, lambda path: files.load_images("--images", path, 2, "X"), UsageError, "text"
    ),
    "arrays": Reader(metric("a.npz"), load_arrays, ValueError, "npz"),
    "arrays in safetensors": Reader(metric("a.safetensors"), load_arrays, ValueError, "safetensors"),
    "shapes to tune": Reader(made("shapes.json", SHAPES), shapes.read_shapes, ValueError, "json",
                             {"negative": SHAPES.replace("4", "-4").encode()}),
    "the tuning cache": Reader(stored, lambda path: Store(DEVICE, path).read(), UserWarning, "json"),
    "a shipped table": Reader(shipped, read_shipped, tables.TableError, "json"),
    "the glyph cache": Reader(glyph_cache, read_glyph_cache, UserWarning, "npz"),
    "decoded photographs": Reader(photographs, read_photographs, UserWarning, "npy"),
    "a checkpoint": Reader(checkpoint, run, ValueError, "pt"),
    "a teacher": Reader(checkpoint, lambda path: load_teacher(str(path)), ValueError, "pt"),
    "a study's results": Reader(
        study_results, lambda path: Results.open(path, STUDY_HEADER), ValueError, "json",
        {"runs of another form": json.dumps(STUDY_HEADER | {"runs": [3]}).encode(),
         "runs no list": json.dumps(STUDY_HEADER | {"runs": {}}).encode(),
         "settings no object": json.dumps(STUDY_HEADER | {"settings": 3, "runs": []}).encode()},
    ),
    "a study to show": Reader(STUDY, lambda path: studies.stored(path.parent), ValueError, "json"),
    "the demo's results": Reader(DEMO, demo_report.demo_section, ValueError, "json"),
    "a benchmark's results": Reader(bench_results, results.read, ValueError, "json",
                                    {"another schema": b'{"schema": 99}', "its schema alone": b'{"schema": 1}'}),
}  # fmt: skip


def pickled(path: Path) -> bytes:
    return pickle.dumps(Bomb(path.parent / "exploded"))


def npy_of(array: np.ndarray, folder: Path) -> bytes:
    with (folder / "other").open("wb") as file:
        np.save(file, array, allow_pickle=True)
    return (folder / "other").read_bytes()


def npz_of(folder: Path, **arrays: Any) -> bytes:
    with (folder / "other").open("wb") as file:
        np.savez(file, **arrays)
    return (folder / "other").read_bytes()


def pt_of(state: object, folder: Path) -> bytes:
    torch.save(state, folder / "other")
    return (folder / "other").read_bytes()


def torn(path: Path, whole: bytes, kind: str) -> dict[str, bytes]:
    """Contents that no reader of the kind may take."""
    chance = random.Random(torch.initial_seed())
    noise = b"\xff\xfe\x80" + chance.randbytes(2000)
    found = {
        "empty": b"",
        "its first byte": whole[:1],
        "half": whole[: len(whole) // 2],
        "without its end": whole.rstrip()[:-1] if kind != "text" else whole[:-3] + b"\xc3",
        "noise": noise,
        "noise after its beginning": whole[: min(64, len(whole) // 2)] + noise,
        "zeros": b"\0" * len(whole),
        "a pickle": pickled(path),
    }
    if kind == "text":
        del found["half"]  # of a list that ends with a line is a shorter list
        found["a blank line"] = b"\n" + whole
    if kind in ("npy", "npz", "safetensors"):
        bombs = np.array([Bomb(path.parent / "exploded")], dtype=object)
        found["pickled objects"] = npy_of(bombs, path.parent)
        found["an archive of pickled objects"] = npz_of(path.parent, W_diag=bombs, images=bombs)
        found["another shape"] = npy_of(np.ones((2, 2, 2, 2, 2)), path.parent)
        found["complex numbers"] = npy_of(np.ones(6, np.complex64), path.parent)
        found["text"] = npy_of(np.array(["a"] * 6), path.parent)
    if kind == "pt":
        tensors = {name: torch.ones(2) for name in STATE}
        found["an object"] = pt_of(Bomb(path.parent / "exploded"), path.parent)
        found["an object among tensors"] = pt_of(tensors | {"model": Bomb(path.parent / "exploded")}, path.parent)
        found["a tensor"] = pt_of(torch.ones(3), path.parent)
        found["a list"] = pt_of([1, 2], path.parent)
        found["other keys"] = pt_of({"weights": torch.ones(3)}, path.parent)
        found["tensors for settings"] = pt_of(tensors, path.parent)
        state = torch.load(path, weights_only=True)
        smaller = {name: x[:1] for name, x in state["model"].items() if x.dim()}
        found["other shapes"] = pt_of(state | {"model": state["model"] | smaller}, path.parent)
    if kind == "json":
        found |= {
            "a list": b"[1]", "null": b"null", "a number": b"3", "text": b'"text"', "no fields": b"{}",
            "other fields": b'{"a": 1}', "nested without end": b"[" * 100_000, "two values": whole + b"{}",
            "no text": b"\xff" + whole,
        }  # fmt: skip
    return found


def ends(reader: Reader, path: Path) -> tuple[str, str]:
    """What reading led to: ("read" or the name of the error, what was said)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            reader.read(path)
        except reader.error as error:
            assert type(error) is reader.error, repr(error)
            return type(error).__name__, str(error)
    mine = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
    assert len(mine) <= 1, mine
    return ("UserWarning", mine[0]) if mine else ("read", "")


@pytest.mark.parametrize("name", READERS)
def test_broken_files(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = reader.make(tmp_path)
    whole = path.read_bytes()
    assert ends(reader, path) == ("read", ""), "what is broken below is whole"
    for kind, content in (torn(path, whole, reader.kind) | (reader.more or {})).items():
        path.write_bytes(content)
        outcome, message = ends(reader, path)
        assert outcome == reader.error.__name__, f"{kind}: {outcome}"
        # SOP's and CUB's lists agree, or don't: either may be named.
        assert path.name in message or path.parent.name in message, f"{kind}: {message}"
        assert "\n" not in message.strip() and len(message) < 1500, f"{kind}: {message}"
        if reader.error is UserWarning:  # set aside, or made again
            again = ends(reader, path)
            assert again == ("read", ""), f"{kind}: {again}"
    assert not (tmp_path / "exploded").exists() and not list(tmp_path.rglob("exploded")), "a pickle was run"


@pytest.mark.parametrize("name", READERS)
def test_a_few_changed_bytes_are_read_or_refused_in_the_same_words(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = reader.make(tmp_path)
    whole = path.read_bytes()
    chance = random.Random(torch.initial_seed())
    for attempt in range(15 if reader.kind == "pt" else 60):
        changed = bytearray(whole)
        # The beginning and the end are where the structure lies.
        ends_of_it = [*range(min(300, len(whole))), *range(max(0, len(whole) - 300), len(whole))]
        for _ in range(1 + attempt % 3):
            changed[chance.choice(ends_of_it)] = chance.randrange(256)
        path.write_bytes(bytes(changed))
        outcome, message = ends(reader, path)
        assert outcome in ("read", reader.error.__name__)
        assert outcome == "read" or tmp_path.name in message or path.name in message, message


def test_a_checkpoint_is_read_as_data_alone(tmp_path: Path) -> None:
    """And what was saved is what comes back."""
    state = {"identity": {"a": 1}, "model": {"x": torch.ones(2)}}
    save_checkpoint(tmp_path / "x.pt", state)
    found = load_checkpoint(tmp_path / "x.pt", ("identity", "model"))
    assert found["identity"] == {"a": 1} and torch.equal(found["model"]["x"], torch.ones(2))
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "y.pt", ("identity",))
