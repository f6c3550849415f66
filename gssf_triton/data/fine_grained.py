"""Fine-grained retrieval, classes disjoint in training and test: CUB-200-2011 and Stanford Online Products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gssf_triton.data.files import (
    LabelledImages,
    existing_folder,
    fault,
    fields_of,
    image_file,
    inside,
    numbered_lines,
    whole_number,
)

#: CUB's classes 1 to 100 are for training, 101 to 200 for testing (Song et al., CVPR 2016).
CUB_CLASSES, CUB_TRAIN_CLASSES = 200, 100
SOP_HEADER = "image_id class_id super_class_id path"


@dataclass(frozen=True)
class RetrievalSplits:
    """Training and test images; no class is in both."""

    train: LabelledImages
    test: LabelledImages


def _column(path: Path, names: str, read: Callable[[int, str], str | int]) -> dict[int, tuple[int, str | int]]:
    """image id → (line, value) of a file with two columns, `names`; `read` checks the second."""
    column: dict[int, tuple[int, str | int]] = {}
    for number, text in numbered_lines(path, f"'{names}'"):
        first, second = fields_of(path, number, text, names)
        image_id = whole_number(path, number, "image_id", first, 1)
        if image_id in column:
            raise fault(path, number, "each image_id once", f"{image_id} again, as in line {column[image_id][0]}")
        column[image_id] = (number, read(number, second))
    return column


def _images(rows: list[tuple[Path, int]]) -> LabelledImages:
    return LabelledImages(tuple(path for path, _ in rows), np.array([label for _, label in rows], dtype=np.int64))


def load_cub200(root: str | Path) -> RetrievalSplits:
    r"""Read CUB-200-2011's lists with the split of metric learning: classes 1–100 train, 101–200 test.

    Args:
        root: The folder that has `images.txt`, `image_class_labels.txt` and `images/`, or the one above it
            (`CUB_200_2011`).

    Returns:
        The images in the order of `images.txt`, labelled 1 to 200.

    Raises:
        FileNotFoundError: a list or folder is missing.
        DataError: a malformed line, an image id twice or in one list only, a class out of range or other than its
            folder's, an image that lies outside the folder, does not exist or is empty, a split without images; file
            and line are named.

    Source:
        Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011; the split: Song et al., CVPR 2016.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from gssf_triton.data import load_cub200
        >>> root = tempfile.TemporaryDirectory()
        >>> names = ("001.Albatross/a.jpg", "200.Yellowthroat/b.jpg")
        >>> for name in names:
        ...     path = Path(root.name) / "images" / name
        ...     path.parent.mkdir(parents=True)
        ...     _ = path.write_bytes(b"an image")
        >>> _ = (Path(root.name) / "images.txt").write_text(f"1 {names[0]}\n2 {names[1]}\n")
        >>> _ = (Path(root.name) / "image_class_labels.txt").write_text("1 1\n2 200\n")
        >>> birds = load_cub200(root.name)
        >>> birds.train.labels.tolist(), birds.test.paths[0].name
        ([1], 'b.jpg')
        >>> root.cleanup()
    """
    folder = existing_folder(root, "CUB_200_2011", "images.txt")
    list_path, label_path = folder / "images.txt", folder / "image_class_labels.txt"
    images = _column(list_path, "image_id image_name", lambda number, text: text)
    labels = _column(
        label_path,
        "image_id class_id",
        lambda number, text: whole_number(label_path, number, "class_id", text, 1, CUB_CLASSES),
    )
    for image_id, (number, _) in labels.items():
        if image_id not in images:
            raise fault(label_path, number, f"an image_id of {list_path.name}", str(image_id))
    rows: list[tuple[Path, int]] = []
    for image_id, (number, name) in images.items():
        if image_id not in labels:
            raise fault(list_path, number, f"an image_id with a class in {label_path.name}", str(image_id))
        line, label = labels[image_id]
        if str(name).partition(".")[0].lstrip("0") != str(label):
            raise fault(label_path, line, f"the class of its folder, {name}", str(label))
        image = inside(list_path, number, folder / "images", str(name))
        rows.append((image_file(list_path, number, image), int(label)))
    splits = RetrievalSplits(
        _images([row for row in rows if row[1] <= CUB_TRAIN_CLASSES]),
        _images([row for row in rows if row[1] > CUB_TRAIN_CLASSES]),
    )
    for part, classes in ((splits.train, "1 to 100"), (splits.test, "101 to 200")):
        if not len(part):
            raise fault(list_path, len(images), f"images of the classes {classes} too", "the end of the file")
    return splits


def _sop_rows(path: Path) -> list[tuple[Path, int, int]]:
    """(image, class, line) of one of SOP's lists."""
    rows: list[tuple[Path, int, int]] = []
    seen: dict[int, int] = {}
    for number, text in numbered_lines(path, f"'{SOP_HEADER}'"):
        if number == 1:
            if text.split() != SOP_HEADER.split():
                raise fault(path, number, f"the header '{SOP_HEADER}'", repr(text))
            continue
        image, label, super_class, name = fields_of(path, number, text, SOP_HEADER)
        image_id = whole_number(path, number, "image_id", image, 1)
        whole_number(path, number, "super_class_id", super_class, 1)
        if image_id in seen:
            raise fault(path, number, "each image_id once", f"{image_id} again, as in line {seen[image_id]}")
        seen[image_id] = number
        class_id = whole_number(path, number, "class_id", label, 1)
        rows.append((image_file(path, number, inside(path, number, path.parent, name)), class_id, number))
    if not rows:
        raise fault(path, 2, f"'{SOP_HEADER}'", "the end of the file")
    return rows


def load_sop(root: str | Path) -> RetrievalSplits:
    r"""Read Stanford Online Products' `Ebay_train.txt` and `Ebay_test.txt`.

    Args:
        root: The folder that has them, or the one above it (`Stanford_Online_Products`).

    Returns:
        The images in the files' order, labelled by `class_id`.

    Raises:
        FileNotFoundError: a list is missing.
        DataError: another header, a malformed line, an image id twice, an image that lies outside the folder, does not
            exist or is empty, a class in both lists; file and line are named.

    Source:
        Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from gssf_triton.data import load_sop
        >>> root = tempfile.TemporaryDirectory()
        >>> (Path(root.name) / "kettle_final").mkdir()
        >>> header = "image_id class_id super_class_id path"
        >>> for part, row in (("train", "1 1 1 kettle_final/1_0.JPG"), ("test", "2 9 1 kettle_final/2_0.JPG")):
        ...     _ = (Path(root.name) / row.split()[-1]).write_bytes(b"an image")
        ...     _ = (Path(root.name) / f"Ebay_{part}.txt").write_text(f"{header}\n{row}\n")
        >>> products = load_sop(root.name)
        >>> products.train.labels.tolist(), products.test.labels.tolist()
        ([1], [9])
        >>> root.cleanup()
    """
    folder = existing_folder(root, "Stanford_Online_Products", "Ebay_train.txt")
    train, test = _sop_rows(folder / "Ebay_train.txt"), _sop_rows(folder / "Ebay_test.txt")
    trained = {label for _, label, _ in train}
    for _, label, number in test:
        if label in trained:
            raise fault(folder / "Ebay_test.txt", number, "a class_id that Ebay_train.txt does not have", str(label))
    return RetrievalSplits(*(_images([(path, label) for path, label, _ in rows]) for rows in (train, test)))
