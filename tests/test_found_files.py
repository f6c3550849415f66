"""Files as people have them: from Windows, macOS and big-endian machines, with pipes in their place, of another set."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_corrupt_files import READERS, ends, shipped

from gssf_triton import topk
from gssf_triton.autotune import tables
from gssf_triton.command import main
from gssf_triton.command.files import load_images
from gssf_triton.data import DataError, load_cub200, load_market1501, load_precomputed, load_sop
from gssf_triton.data.precomputed import is_repeated
from gssf_triton.integrations.arrays import folded_queries, load_arrays

BIG = ">" if sys.byteorder == "little" else "<"


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails where something waits for ever."""

    def too_long(*_: object) -> None:
        raise AssertionError("it waits for whoever writes into the pipe")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null")], ids=["pipe", "device"])
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_a_device_in_a_files_place(
    name: str, make: Callable[[Path], object], in_time: None, tmp_path: Path
) -> None:
    """Whoever opens a pipe to read it waits for a writer: it is refused, or set aside, before."""
    reader = READERS[name]
    path = reader.make(tmp_path)
    path.unlink()
    make(path)
    if reader.error is DataError:
        with pytest.raises(FileNotFoundError, match="no file"):
            reader.read(path)
        return
    outcome, message = ends(reader, path)
    assert outcome == reader.error.__name__
    assert path.name in message or path.parent.name in message, message


@pytest.mark.parametrize("ending", [".lock", ".tmp"])
def test_a_pipe_beside_the_tuning_cache(ending: str, in_time: None, tmp_path: Path) -> None:
    reader = READERS["the tuning cache"]
    path = reader.make(tmp_path)
    path.with_name(path.name + ending).unlink(missing_ok=True)
    os.mkfifo(path.with_name(path.name + ending))
    assert ends(reader, path) == ("read", "")
    path.unlink()  # to be written anew
    with pytest.warns(UserWarning, match="cannot be used"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("gssf_triton.storage._warned", set())
        reader.make(tmp_path)


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.kind in ("text", "json")])
def test_a_byte_order_mark_and_ends_of_lines_of_windows(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = reader.make(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert ends(reader, path) == ("read", "")


def test_a_mark_is_no_part_of_the_first_caption(tmp_path: Path) -> None:
    folder = tmp_path / "f30k_precomp"
    folder.mkdir()
    np.save(folder / "dev_ims.npy", np.ones((2, 3, 4), np.float32))
    (folder / "dev_caps.txt").write_bytes("\ufeffa dog\r\na cat\r\n".encode())
    assert load_precomputed(tmp_path, "f30k", "dev").captions == ("a dog", "a cat")


# ---------------------------------------------------------------- the other byte order


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main([*argv, "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_the_other_byte_order_gives_the_same_results(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features, labels and weights: the same numbers written in both orders."""
    monkeypatch.chdir(tmp_path)
    x, ids = np.random.default_rng(0).normal(size=(12, 8)), np.arange(12) // 3
    W_diag, W_blocks = np.linspace(0.5, 2, 8), np.random.default_rng(1).normal(size=(2, 4, 4))
    for order in ("=", BIG):
        np.save(f"x{order}.npy", x.astype(f"{order}{kind}"))
        np.save(f"y{order}.npy", x[::-1].astype(f"{order}{kind}"))
        for label in ("i2", "i4", "i8", "u4"):
            np.save(f"ids-{label}{order}.npy", ids.astype(f"{order}{label}"))
        weights = {"W_diag": W_diag, "W_blocks": W_blocks}
        np.savez(f"metric{order}.npz", **{name: w.astype(f"{order}{kind}") for name, w in weights.items()})
    assert np.load(f"x{BIG}.npy").dtype.byteorder == BIG and not np.load(f"metric{BIG}.npz")["W_diag"].dtype.isnative
    for metric in ("--weights=metric{}.npz", "--cosine"):
        results = [
            [
                call(capsys, "search", f"x{o}.npy", f"y{o}.npy", metric.format(o), "--gallery-ids", f"ids-i4{o}.npy"),
                call(capsys, "search", f"x{o}.npy", "y=.npy", metric.format(o), "--gallery-ids", f"ids-u4{o}.npy"),
                call(capsys, "evaluate", "retrieval", f"x{o}.npy", metric.format(o), "--labels", f"ids-i2{o}.npy"),
                call(capsys, "evaluate", "image-text", f"x{o}.npy", f"y{o}.npy", metric.format(o)),
            ]
            for o in ("=", BIG)
        ]
        assert results[0] == results[1]
    queries, weight = torch.from_numpy(x.astype(kind)), torch.from_numpy(W_diag.astype(kind))
    native, swapped = (topk(queries, np.load(f"y{o}.npy", mmap_mode="r"), weight, k=3) for o in ("=", BIG))
    assert all(torch.equal(one, other) for one, other in zip(native, swapped, strict=True))
    assert all(array.dtype.isnative for array in load_arrays(f"metric{BIG}.npz").values())
    assert np.array_equal(*(folded_queries(np.load(f"x{o}.npy"), weight) for o in ("=", BIG)))


def test_precomputed_features_of_the_other_byte_order(tmp_path: Path) -> None:
    (tmp_path / "coco_precomp").mkdir()
    features = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(tmp_path / "coco_precomp/dev_ims.npy", features.astype(f"{BIG}f4"))
    (tmp_path / "coco_precomp/dev_caps.txt").write_text("a dog .\n" * 10)
    images = load_precomputed(tmp_path, "coco", "dev").images
    assert torch.equal(torch.from_numpy(images[1]), torch.arange(12.0, 24).view(3, 4))


# ---------------------------------------------------------------- hidden files, capitals, links


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 5)).save(path, "JPEG")


def test_market1501_with_macos_hidden_files_and_capitals(tmp_path: Path) -> None:
    for folder, identity in (("bounding_box_train", 2), ("bounding_box_test", 7), ("query", 7)):
        for name in (f"000{identity}_c1s1_000001_00.JPG", f"000{identity}_c2s1_000002_00.jpg"):
            picture(tmp_path / folder / name)
            (tmp_path / folder / f"._{name}").write_bytes(b"\0\5\x16\7")
        for name in (".DS_Store", "Thumbs.db", ".0002_c1s1_000001_00.jpg"):
            (tmp_path / folder / name).write_bytes(b"x")
    market = load_market1501(tmp_path)
    assert market.train.cams.tolist() == market.query.cams.tolist() == [1, 2]
    assert [path.name[0] for path in market.gallery.paths] == ["0", "0"]


def test_a_folder_of_images_with_hidden_files_and_capitals(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.jpeg", "c.Png"):
        picture(tmp_path / name)
        (tmp_path / f"._{name}").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert [path.name for path in load_images("--images", tmp_path, 3, "GALLERY")] == ["a.jpeg", "b.JPG", "c.Png"]


def test_shipped_tables_with_macos_hidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shipped(tmp_path)
    path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    monkeypatch.setattr(tables, "SHIPPED", path.parent)
    assert len(tables.shipped()) == 1


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    from gssf_triton.integrations.arrays import save_arrays

    for name in ("METRIC.NPZ", "Metric.SafeTensors"):
        save_arrays(tmp_path / name, W_diag=torch.arange(3.0))
        assert load_arrays(tmp_path / name)["W_diag"].tolist() == [0, 1, 2]


OUTSIDE = ["../secret.jpg", "a/../../secret.jpg", "{root}/secret.jpg", "a/../b.jpg"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_data_sets_list_names_files_of_its_folder_alone(name: str, tmp_path: Path) -> None:
    picture(tmp_path / "secret.jpg")
    sop, cub = tmp_path / "sop", tmp_path / "cub"
    name = name.format(root=tmp_path)
    for path in (sop / "a/b.jpg", sop / "b.jpg", cub / "images/200.B/b.jpg", cub / "images/001.A/a/x.jpg"):
        picture(path)
    header = "image_id class_id super_class_id path\n"
    (sop / "Ebay_train.txt").write_text(f"{header}1 1 1 {name}\n")
    (sop / "Ebay_test.txt").write_text(f"{header}2 9 1 b.jpg\n")
    (cub / "images.txt").write_text(f"1 001.A/{name}\n2 200.B/b.jpg\n")
    (cub / "image_class_labels.txt").write_text("1 1\n2 200\n")
    with pytest.raises(DataError, match=r"Ebay_train.txt, line 2: .* outside"):
        load_sop(sop)
    if not name.startswith("/"):  # 001.A//tmp lies inside
        with pytest.raises(DataError, match=r"images.txt, line 1: .* outside"):
            load_cub200(cub)


def test_a_users_own_list_and_links_may_lead_anywhere(tmp_path: Path) -> None:
    picture(tmp_path / "disk/b.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/files").symlink_to(tmp_path / "disk")
    header = "image_id class_id super_class_id path\n"
    for part, line in (("train", "1 1 1 files/b.jpg"), ("test", "2 9 1 files/b.jpg")):
        (tmp_path / f"set/Ebay_{part}.txt").write_text(f"{header}{line}\n")
    assert load_sop(tmp_path / "set").train.paths[0].read_bytes() == (tmp_path / "disk/b.jpg").read_bytes()
    (tmp_path / "set/list.txt").write_text(f"../disk/b.jpg\n{tmp_path}/disk/b.jpg\n")
    assert len(load_images("--images", tmp_path / "set/list.txt", 2, "GALLERY")) == 2


# ---------------------------------------------------------------- another set's folder, images five times


@pytest.mark.parametrize(
    ("load", "made"),
    [
        (load_market1501, {"images.txt": "1 001.A/a.jpg\n", "image_class_labels.txt": "1 1\n"}),
        (load_cub200, {"Ebay_train.txt": "image_id class_id super_class_id path\n"}),
        (load_sop, {"bounding_box_train/0002_c1s1_000001_00.jpg": "x"}),
        (lambda root: load_precomputed(root, "f30k", "dev"), {"coco_precomp/dev_caps.txt": "a\n"}),
    ],
)
def test_another_sets_folder_is_one_clear_line(
    load: Callable[[Path], object], made: dict[str, str], tmp_path: Path
) -> None:
    for name, content in made.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises((DataError, FileNotFoundError), match=f"{tmp_path}.*not found, nor in") as told:
        load(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "other"), [("f30k", "coco"), ("coco", "f30k")])
def test_precomputed_features_of_the_other_set(name: str, other: str, tmp_path: Path) -> None:
    """Given the folder itself, whose files are named alike."""
    folder = tmp_path / f"{other}_precomp"
    folder.mkdir()
    np.save(folder / "dev_ims.npy", np.ones((2, 3, 4), np.float32))
    (folder / "dev_caps.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=f"expected the features of {name}"):
        load_precomputed(folder, name, "dev")
    assert len(load_precomputed(folder, other, "dev")) == 2


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_image_rows_that_stand_five_times_are_taken_once(
    ids: bool, noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """VSE++ writes an image once a caption: its numbers are those of every fifth row."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(30, 8)).astype(np.float32)
    texts = (images.repeat(5, 0) + 2 * rng.normal(size=(150, 8))).astype(np.float32)
    five = (images.repeat(5, 0) * (1 + noise * rng.normal(size=(150, 1)))).astype(np.float32)
    np.save("images.npy", five[::5])
    np.save("five.npy", five)
    np.save("texts.npy", texts)
    np.save("ids.npy", np.arange(30).repeat(5))
    wanted = call(capsys, "evaluate", "image-text", "images.npy", "texts.npy", "--cosine", "--folds", "3")
    assert 0 < wanted["t2i_r1"] < 100
    given = ["--image-ids", "ids.npy", "--text-ids", "ids.npy"] if ids else []
    assert call(capsys, "evaluate", "image-text", "five.npy", "texts.npy", "--cosine", "--folds", "3", *given) == wanted
    assert main(["evaluate", "image-text", "five.npy", "texts.npy", "--cosine", *given]) == 0
    assert "IMAGES: five.npy has every image five times" in capsys.readouterr().err


def test_images_that_a_poor_model_hardly_tells_apart_are_no_repeated_ones() -> None:
    rng = np.random.default_rng(0)
    images = (1 + 1e-4 * rng.normal(size=(30, 8))).astype(np.float32)
    assert not is_repeated(images) and is_repeated(images.repeat(5, 0))
    assert (
        is_repeated(np.asfortranarray(images.repeat(5, 0)))
        and not is_repeated(images[:0])
        and not is_repeated(images[:7])
    )


def test_rows_that_are_alike_at_the_ends_alone_are_no_repeated_images(tmp_path: Path) -> None:
    (tmp_path / "f30k_precomp").mkdir()
    features = np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)
    features[:5], features[-5:] = features[0], features[-1]
    np.save(tmp_path / "f30k_precomp/dev_ims.npy", features)
    (tmp_path / "f30k_precomp/dev_caps.txt").write_text("a dog .\n" * 20)
    assert load_precomputed(tmp_path, "f30k", "dev").images.shape == (20, 3, 4)
    np.save(tmp_path / "f30k_precomp/dev_ims.npy", features[::5].repeat(5, 0))
    assert np.array_equal(load_precomputed(tmp_path, "f30k", "dev").images, features[::5])


def test_repeated_images_that_hold_nan(tmp_path: Path) -> None:
    """An encoder's fault stands five times, too; one that stands once makes rows differ."""
    images = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    images[1, 2], images[4, 3] = np.nan, np.inf
    five = images.repeat(5, 0)
    assert is_repeated(five) and not is_repeated(images.repeat(5, 1).reshape(30, 8))
    five[7, 5] = np.nan
    assert not is_repeated(five)
    five = images.repeat(5, 0)
    five[22, 3] = -np.inf
    assert not is_repeated(five)


@pytest.mark.parametrize("folder", ["COCO_precomp", "Coco_Precomp"])
def test_another_sets_folder_however_it_is_written(folder: str, tmp_path: Path) -> None:
    made = tmp_path / folder
    made.mkdir()
    np.save(made / "dev_ims.npy", np.ones((2, 3, 4), np.float32))
    (made / "dev_caps.txt").write_text("a dog .\n" * 10)
    with pytest.raises(DataError, match="another set's folder"):
        load_precomputed(made, "f30k", "dev")
    assert load_precomputed(made, "coco", "dev").images.shape == (2, 3, 4)


@pytest.mark.parametrize("digits", ["9" * 30, "9223372036854775808", "9" * 5000])
@pytest.mark.parametrize("field", ["image_id", "class_id", "super_class_id"])
def test_numbers_that_no_int64_holds(field: str, digits: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    names = ("image_id", "class_id", "super_class_id")

    def lists(of_train: str) -> None:
        for part, other in (("train", of_train), ("test", "8")):
            line = " ".join(other if name == field else "7" if part == "train" else "9" for name in names)
            text = f"image_id class_id super_class_id path\n{line} a.jpg\n"
            (tmp_path / f"Ebay_{part}.txt").write_text(text)

    lists(digits)
    with pytest.raises(
        DataError, match=rf"Ebay_train.txt, line 2: expected {field}, an integer from 1 to 9223372"
    ) as e:
        load_sop(tmp_path)
    assert len(str(e.value)) < 300
    lists("0" * 30 + "9223372036854775807")
    labels = load_sop(tmp_path).train.labels.tolist()
    assert labels == [2**63 - 1 if field == "class_id" else 7]


def test_a_bird_folder_of_a_long_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "9" * 5000
    (tmp_path / "images.txt").write_text(f"1 {name}.A/a.jpg\n")
    (tmp_path / "image_class_labels.txt").write_text("1 1\n")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"image_class_labels.txt, line 1: expected the class of its folder"):
        load_cub200(tmp_path)
    np.save(tmp_path / "x.npy", np.eye(2, dtype=np.float32))
    np.save(tmp_path / "ids.npy", np.array([1, 2**64 - 1], np.uint64))
    command = ["evaluate", "retrieval", str(tmp_path / "x.npy"), "--cosine", "--labels", str(tmp_path / "ids.npy")]
    assert main(command) == 2
    assert "at most 9223372036854775807, got 18446744073709551615" in capsys.readouterr().err
