"""The readers on tiny folders in the data sets' own layouts, and on each way such a folder is found broken."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gssf_triton.data import DataError, load_cub200, load_market1501, load_precomputed, load_sop

Break = Callable[[Path], object]


def write(path: Path, content: str | bytes = b"an image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def edit(name: str, old: str, new: str) -> Break:
    """Replace text in one of the folder's files; the text must be there."""

    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return change


def check_fault(load: Callable[[], object], error: type[Exception], named: list[str]) -> None:
    with pytest.raises(error) as raised:
        load()
    message = str(raised.value)
    for part in named:
        assert part in message, f"{part!r} is not in: {message}"
    assert error is FileNotFoundError or re.search(r"expected .*, got ", message), message


# ---------------------------------------------------------------- precomputed features


@pytest.fixture
def precomputed(tmp_path: Path) -> Path:
    """Three images of 36 regions, five captions each, as f30k_precomp/dev."""
    folder = tmp_path / "f30k_precomp"
    folder.mkdir()
    np.save(folder / "dev_ims.npy", np.random.default_rng().normal(size=(3, 36, 16)).astype(np.float32))
    write(folder / "dev_caps.txt", "".join(f"caption {i} of a café .\n" for i in range(15)))
    return tmp_path


def test_precomputed_features(precomputed: Path) -> None:
    dev = load_precomputed(precomputed, "f30k", "dev")
    assert np.array_equal(dev.images, np.load(precomputed / "f30k_precomp" / "dev_ims.npy"))
    assert dev.captions[7] == "caption 7 of a café ." and len(dev.captions) == 15 and len(dev) == 3
    assert dev.image_ids.dtype == np.int64 and dev.image_ids.tolist() == [i // 5 for i in range(15)]


def test_features_stay_on_disk(precomputed: Path) -> None:
    images = load_precomputed(str(precomputed), "f30k", "dev").images
    assert isinstance(images, np.memmap) and not images.flags.writeable


def test_the_folder_itself_is_a_root_too(precomputed: Path) -> None:
    assert len(load_precomputed(precomputed / "f30k_precomp", "f30k", "dev")) == 3


def test_one_caption_an_image(precomputed: Path) -> None:
    write(precomputed / "coco_precomp" / "train_caps.txt", "one\ntwo\nthree\nfour\nfive\n")
    images = np.random.default_rng().normal(size=(5, 36, 4)).astype(np.float16)
    np.save(precomputed / "coco_precomp" / "train_ims.npy", images)
    train = load_precomputed(precomputed, "coco", "train")
    assert train.image_ids.tolist() == [0, 1, 2, 3, 4] and len(train) == 5 and train.captions[1] == "two"


def test_rows_repeated_for_each_caption_are_one_image(precomputed: Path) -> None:
    images = np.random.default_rng().normal(size=(3, 36, 4)).astype(np.float32)
    np.save(precomputed / "f30k_precomp" / "dev_ims.npy", images.repeat(5, axis=0))
    dev = load_precomputed(precomputed, "f30k", "dev")
    assert np.array_equal(dev.images, images) and isinstance(dev.images, np.memmap)
    assert dev.image_ids.tolist() == [i // 5 for i in range(15)]


def _cut(name: str, size: int) -> Break:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:size])


def _save(array: object) -> Break:
    return lambda root: np.save(root / "f30k_precomp/dev_ims.npy", np.asarray(array), allow_pickle=True)


def _savez(root: Path) -> None:
    with (root / "f30k_precomp/dev_ims.npy").open("wb") as file:
        np.savez(file, images=np.zeros((3, 36, 16), dtype=np.float32))


IMS, CAPS = "f30k_precomp/dev_ims.npy", "f30k_precomp/dev_caps.txt"

PRECOMPUTED_FAULTS: dict[str, tuple[Break, type[Exception], list[str]]] = {
    "no-images": (lambda root: (root / IMS).unlink(), FileNotFoundError, ["dev_ims.npy"]),
    "no-captions": (lambda root: (root / CAPS).unlink(), FileNotFoundError, ["dev_caps.txt", "caption"]),
    "cut-data": (_cut(IMS, 3000), DataError, ["dev_ims.npy", "3000 bytes"]),
    "cut-header": (_cut(IMS, 40), DataError, ["dev_ims.npy", "40 bytes"]),
    "empty-images": (_cut(IMS, 0), DataError, ["dev_ims.npy", "0 bytes"]),
    "not-npy": (lambda root: write(root / IMS, b"x" * 999), DataError, ["dev_ims.npy", ".npy"]),
    "npz": (_savez, DataError, ["dev_ims.npy", "npz"]),
    "pickled": (_save(np.array([{"a": 1}], dtype=object)), DataError, ["dev_ims.npy", ".npy"]),
    "integers": (_save(np.ones((3, 36, 4), dtype=np.int64)), DataError, ["dev_ims.npy", "int64"]),
    "two-dimensions": (_save(np.ones((3, 36))), DataError, ["dev_ims.npy", "(3, 36)", "regions"]),
    "no-rows": (_save(np.ones((0, 36, 4))), DataError, ["dev_ims.npy", "(0, 36, 4)"]),
    "caption-missing": (edit(CAPS, "caption 7 of a café .\n", ""), DataError, ["dev_caps.txt, line 14", "15 lines"]),
    "caption-too-many": (edit(CAPS, "caption 7", "more\ncaption 7"), DataError, ["dev_caps.txt, line 16", "got 16"]),
    "captions-cut": (_cut(CAPS, 150), DataError, ["dev_caps.txt, line", "3 or 15"]),
    "blank-line": (edit(CAPS, "caption 4 of a café .", "  "), DataError, ["dev_caps.txt, line 5", "blank"]),
    "not-utf-8": (
        lambda root: write(root / CAPS, (root / CAPS).read_text().encode("latin-1")),
        DataError,
        ["dev_caps.txt, line 1", "UTF-8"],
    ),
    "empty-captions": (_cut(CAPS, 0), DataError, ["dev_caps.txt", "empty"]),
}


@pytest.mark.parametrize("name", PRECOMPUTED_FAULTS)
def test_broken_precomputed_features(name: str, precomputed: Path) -> None:
    damage, error, named = PRECOMPUTED_FAULTS[name]
    damage(precomputed)
    check_fault(lambda: load_precomputed(precomputed, "f30k", "dev"), error, named)


def test_unknown_name_and_split(precomputed: Path) -> None:
    with pytest.raises(ValueError, match=r"name must be one of 'f30k', 'coco', got 'flickr'"):
        load_precomputed(precomputed, "flickr", "dev")
    with pytest.raises(ValueError, match=r"split must be one of .*'testall', got 'val'"):
        load_precomputed(precomputed, "f30k", "val")


# ---------------------------------------------------------------- Market-1501

TRAIN, GALLERY, QUERY = "bounding_box_train", "bounding_box_test", "query"


@pytest.fixture
def market(tmp_path: Path) -> Path:
    for name in (
        f"{TRAIN}/0002_c1s1_000451_03.jpg",
        f"{TRAIN}/0002_c6s3_000776_01.jpg",
        f"{TRAIN}/0007_c2s3_071052_01.jpg",
        f"{TRAIN}/Thumbs.db",
        f"{GALLERY}/-1_c1s1_000401_03.jpg",
        f"{GALLERY}/0000_c5s1_000151_01.jpg",
        f"{GALLERY}/0001_c2s1_000301_00.jpg",
        f"{GALLERY}/1501_c6s4_001902_01.jpg.jpg",
        f"{QUERY}/0001_c1s1_001051_00.jpg",
    ):
        write(tmp_path / name)
    return tmp_path


def test_market1501(market: Path) -> None:
    data = load_market1501(market)
    assert data.train.ids.tolist() == [2, 2, 7] and data.train.cams.tolist() == [1, 6, 2]
    assert data.gallery.ids.tolist() == [-1, 0, 1, 1501] and data.gallery.cams.tolist() == [1, 5, 2, 6]
    assert data.query.ids.tolist() == [1] and data.query.cams.tolist() == [1]
    assert data.query.ids.dtype == data.query.cams.dtype == np.int64
    assert data.query.paths == (market / QUERY / "0001_c1s1_001051_00.jpg",) and len(data.train) == 3


def test_market1501_in_its_archives_folder(market: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    above = tmp_path_factory.mktemp("above")
    market.rename(above / "Market-1501-v15.09.15")
    assert len(load_market1501(above).gallery) == 4


def _without(folder: str) -> Break:
    def remove(root: Path) -> None:
        for path in (root / folder).iterdir():
            path.unlink()
        (root / folder).rmdir()

    return remove


MARKET_FAULTS: dict[str, tuple[Break, type[Exception], list[str]]] = {
    "no-train": (_without(TRAIN), FileNotFoundError, [TRAIN]),
    "no-gallery": (_without(GALLERY), FileNotFoundError, [GALLERY, "0002_c1s1_000451_03.jpg"]),
    "no-query": (_without(QUERY), FileNotFoundError, [QUERY]),
    "no-images": (
        lambda root: (root / QUERY / "0001_c1s1_001051_00.jpg").rename(root / QUERY / "a.png"),
        DataError,
        [QUERY, "no .jpg"],
    ),
    "no-camera": (lambda root: write(root / GALLERY / "0009_s1_000001_01.jpg"), DataError, ["0009_s1_000001_01.jpg"]),
    "camera-7": (
        lambda root: write(root / GALLERY / "0009_c7s1_000001_01.jpg"),
        DataError,
        ["0009_c7s1", "camera 1 to 6"],
    ),
    "identity": (lambda root: write(root / GALLERY / "99_c1s1_000001_01.jpg"), DataError, ["99_c1s1", "four digits"]),
    "empty-file": (
        lambda root: write(root / GALLERY / "0009_c1s1_000001_01.jpg", b""),
        DataError,
        ["0009_c1s1_000001_01.jpg", "empty"],
    ),
    "junk-query": (lambda root: write(root / QUERY / "-1_c1s1_000001_01.jpg"), DataError, ["-1_c1s1_000001_01.jpg"]),
    "distractor-train": (lambda root: write(root / TRAIN / "0000_c1s1_000001_01.jpg"), DataError, ["0000_c1s1_000001"]),
    "train-in-query": (lambda root: write(root / QUERY / "0007_c1s1_000001_01.jpg"), DataError, ["0007_c1s1", TRAIN]),
    "train-in-gallery": (lambda root: write(root / GALLERY / "0007_c1s1_000001_01.jpg"), DataError, ["0007_c1s1"]),
}


@pytest.mark.parametrize("name", MARKET_FAULTS)
def test_broken_market1501(name: str, market: Path) -> None:
    damage, error, named = MARKET_FAULTS[name]
    damage(market)
    check_fault(lambda: load_market1501(market), error, named)


# ---------------------------------------------------------------- CUB-200-2011


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    names = ["001.Albatross/A_0046_18.jpg", "100.Pelican/P_1.jpg", "101.Pelican/P_2.jpg", "200.Yellow throat/Y 1.jpg"]
    for name in names:
        write(tmp_path / "images" / name)
    write(tmp_path / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    write(tmp_path / "image_class_labels.txt", "1 1\n2 100\n3 101\n4 200\n")
    return tmp_path


def test_cub200(cub: Path) -> None:
    data = load_cub200(cub)
    assert data.train.labels.tolist() == [1, 100] and data.test.labels.tolist() == [101, 200]
    assert data.train.labels.dtype == np.int64
    assert data.test.paths[1] == cub / "images" / "200.Yellow throat" / "Y 1.jpg" and data.test.paths[1].is_file()


def test_cub200_in_its_archives_folder(cub: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    above = tmp_path_factory.mktemp("above")
    cub.rename(above / "CUB_200_2011")
    assert len(load_cub200(above).train) == 2


LABELS = "image_class_labels.txt"

CUB_FAULTS: dict[str, tuple[Break, type[Exception], list[str]]] = {
    "no-list": (lambda root: (root / "images.txt").unlink(), FileNotFoundError, ["images.txt"]),
    "no-labels": (lambda root: (root / LABELS).unlink(), FileNotFoundError, [LABELS]),
    "no-image": (
        lambda root: (root / "images/101.Pelican/P_2.jpg").unlink(),
        DataError,
        ["images.txt, line 3", "P_2.jpg", "does not exist"],
    ),
    "empty-image": (
        lambda root: write(root / "images/101.Pelican/P_2.jpg", b""),
        DataError,
        ["images.txt, line 3", "empty"],
    ),
    "one-field": (edit("images.txt", "2 100.Pelican/P_1.jpg", "2"), DataError, ["images.txt, line 2", "2 fields"]),
    "id-word": (edit("images.txt", "2 100", "two 100"), DataError, ["images.txt, line 2", "image_id", "'two'"]),
    "id-twice": (edit("images.txt", "2 100", "1 100"), DataError, ["images.txt, line 2", "line 1"]),
    "class-201": (edit(LABELS, "4 200", "4 201"), DataError, [f"{LABELS}, line 4", "from 1 to 200", "201"]),
    "class-0": (edit(LABELS, "4 200", "4 0"), DataError, [f"{LABELS}, line 4", "from 1 to 200"]),
    "class-negative": (edit(LABELS, "4 200", "4 -1"), DataError, [f"{LABELS}, line 4", "'-1'"]),
    "other-class": (edit(LABELS, "3 101", "3 102"), DataError, [f"{LABELS}, line 3", "101.Pelican", "102"]),
    "label-missing": (edit(LABELS, "3 101\n", ""), DataError, ["images.txt, line 3", LABELS]),
    "image-missing": (
        edit("images.txt", "3 101.Pelican/P_2.jpg\n", ""),
        DataError,
        [f"{LABELS}, line 3", "images.txt"],
    ),
    "cut": (_cut("images.txt", 32), DataError, ["images.txt, line 2", "2 fields"]),
    "only-train": (
        lambda root: (
            edit("images.txt", (root / "images.txt").read_text().partition("3 ")[1:][1], "")(root),
            edit("images.txt", "\n3 ", "\n")(root),
            edit(LABELS, "3 101\n4 200\n", "")(root),
        ),
        DataError,
        ["images.txt, line 2", "101 to 200"],
    ),
    "blank-line": (edit(LABELS, "3 101", ""), DataError, [f"{LABELS}, line 3", "blank"]),
    "empty": (_cut(LABELS, 0), DataError, [LABELS, "empty"]),
}


@pytest.mark.parametrize("name", CUB_FAULTS)
def test_broken_cub200(name: str, cub: Path) -> None:
    damage, error, named = CUB_FAULTS[name]
    damage(cub)
    check_fault(lambda: load_cub200(cub), error, named)


# ---------------------------------------------------------------- Stanford Online Products


@pytest.fixture
def sop(tmp_path: Path) -> Path:
    rows = {
        "train": ["1 1 1 bicycle_final/1_0.JPG", "2 1 1 bicycle_final/1_1.JPG", "3 2 2 cabinet_final/2_0.JPG"],
        "test": ["4 11319 1 bicycle_final/3_0.JPG", "5 11319 1 bicycle_final/3_1.JPG"],
    }
    for part, lines in rows.items():
        for line in lines:
            write(tmp_path / line.split()[-1])
        write(tmp_path / f"Ebay_{part}.txt", "\n".join(["image_id class_id super_class_id path", *lines, ""]))
    return tmp_path


def test_sop(sop: Path) -> None:
    data = load_sop(sop)
    assert data.train.labels.tolist() == [1, 1, 2] and data.test.labels.tolist() == [11319, 11319]
    assert data.train.paths[2] == sop / "cabinet_final" / "2_0.JPG" and len(data.test) == 2


SOP_FAULTS: dict[str, tuple[Break, type[Exception], list[str]]] = {
    "no-train": (lambda root: (root / "Ebay_train.txt").unlink(), FileNotFoundError, ["Ebay_train.txt"]),
    "no-test": (lambda root: (root / "Ebay_test.txt").unlink(), FileNotFoundError, ["Ebay_test.txt"]),
    "no-header": (
        edit("Ebay_test.txt", "image_id class_id super_class_id path\n", ""),
        DataError,
        ["Ebay_test.txt, line 1", "super_class_id"],
    ),
    "three-fields": (edit("Ebay_train.txt", "2 1 1 ", "2 1 "), DataError, ["Ebay_train.txt, line 3", "4 fields"]),
    "class-word": (edit("Ebay_train.txt", "2 1 1", "2 x 1"), DataError, ["Ebay_train.txt, line 3", "class_id", "'x'"]),
    "super-class": (edit("Ebay_train.txt", "2 1 1", "2 1 0"), DataError, ["Ebay_train.txt, line 3", "super_class_id"]),
    "id-twice": (edit("Ebay_train.txt", "2 1 1", "1 1 1"), DataError, ["Ebay_train.txt, line 3", "line 2"]),
    "no-image": (
        lambda root: (root / "cabinet_final/2_0.JPG").unlink(),
        DataError,
        ["Ebay_train.txt, line 4", "2_0.JPG"],
    ),
    "cut": (_cut("Ebay_train.txt", 60), DataError, ["Ebay_train.txt, line 2"]),
    "header-only": (_cut("Ebay_test.txt", 38), DataError, ["Ebay_test.txt, line 2", "end of the file"]),
    "class-in-both": (edit("Ebay_test.txt", "5 11319", "5 2"), DataError, ["Ebay_test.txt, line 3", "got 2"]),
    "blank-line": (edit("Ebay_test.txt", "\n4", "\n\n4"), DataError, ["Ebay_test.txt, line 2", "blank"]),
}


@pytest.mark.parametrize("name", SOP_FAULTS)
def test_broken_sop(name: str, sop: Path) -> None:
    damage, error, named = SOP_FAULTS[name]
    damage(sop)
    check_fault(lambda: load_sop(sop), error, named)


@pytest.mark.parametrize("load", [load_market1501, load_cub200, load_sop], ids=lambda load: load.__name__)
def test_no_such_folder(load: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load(tmp_path)


def test_what_is_read_cannot_be_reassigned(sop: Path) -> None:
    data = load_sop(sop)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.train = data.test  # type: ignore[misc]
