"""Market-1501: pedestrians seen by six cameras (Zheng et al., "Scalable Person Re-identification", ICCV 2015)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gssf_triton.data.files import existing_folder, fault, image_file, visible_files

#: identity, camera, sequence, frame, box: 0002_c1s1_000451_03.jpg. Identity −1 is junk, 0000 a distractor.
FILE_NAME = re.compile(r"(-1|\d{4})_c([1-6])s(\d+)_(\d+)_(\d+)(?i:\.jpg)+", re.ASCII)
FOLDERS = {"train": "bounding_box_train", "gallery": "bounding_box_test", "query": "query"}
JUNK, DISTRACTOR = -1, 0


@dataclass(frozen=True)
class PersonImages:
    """Image files, who is on them and which camera took them.

    Attributes:
        paths: The n files, sorted by name.
        ids: (n,) int64 identities; in the gallery −1 is junk (to be left out) and 0 a distractor (to be kept).
        cams: (n,) int64 cameras, 1 to 6.
    """

    paths: tuple[Path, ...]
    ids: NDArray[np.int64]
    cams: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Market1501:
    """The three parts; no identity of `train` is in `gallery` or `query`.

    `gssf_triton.metrics.reid` takes the ids and cameras of `query` and `gallery` as they are.
    """

    train: PersonImages
    gallery: PersonImages
    query: PersonImages


def _read(folder: Path) -> PersonImages:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected images named as 0002_c1s1_000451_03.jpg")
    paths = tuple(visible_files(folder, (".jpg",)))
    if not paths:
        raise fault(folder, None, "images named as 0002_c1s1_000451_03.jpg", "a folder with no .jpg file")
    ids, cams = [], []
    for path in paths:
        parts = FILE_NAME.fullmatch(path.name)
        if parts is None:
            raise fault(
                path,
                None,
                "a name as 0002_c1s1_000451_03.jpg: identity (four digits or -1), camera 1 to 6, sequence, frame, box",
                repr(path.name),
            )
        image_file(folder, None, path)
        ids.append(int(parts[1]))
        cams.append(int(parts[2]))
    return PersonImages(paths, np.array(ids, dtype=np.int64), np.array(cams, dtype=np.int64))


def load_market1501(root: str | Path) -> Market1501:
    """Read the file names of Market-1501.

    Args:
        root: The folder that has `bounding_box_train`, `bounding_box_test` and `query`, or the one above it
            (`Market-1501-v15.09.15`). Other files than .jpg are ignored.

    Raises:
        FileNotFoundError: a folder is missing.
        DataError: a folder without images, a name of another form, an empty file, junk or distractors among the
            training images or the queries, an identity in training and in test.

    Source:
        Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from gssf_triton.data import load_market1501
        >>> root = tempfile.TemporaryDirectory()
        >>> for name in ("bounding_box_train/0002_c1s1_000451_03", "bounding_box_test/-1_c3s2_000001_01",
        ...              "bounding_box_test/0007_c3s2_000009_01", "query/0007_c5s1_000100_00"):
        ...     path = Path(root.name) / f"{name}.jpg"
        ...     path.parent.mkdir(exist_ok=True)
        ...     _ = path.write_bytes(b"an image")
        >>> market = load_market1501(root.name)
        >>> market.gallery.ids.tolist(), market.gallery.cams.tolist(), market.query.ids.tolist()
        ([-1, 7], [3, 3], [7])
        >>> root.cleanup()
    """
    folder = existing_folder(root, "Market-1501-v15.09.15", FOLDERS["train"])
    market = Market1501(**{part: _read(folder / name) for part, name in FOLDERS.items()})
    for part in (market.train, market.query):
        for path, identity in zip(part.paths, part.ids, strict=True):
            if identity in (JUNK, DISTRACTOR):
                raise fault(path, None, "an identity of at least 1 (-1 and 0000 are for the gallery)", str(identity))
    trained = set(market.train.ids.tolist())
    for part in (market.gallery, market.query):
        for path, identity in zip(part.paths, part.ids.tolist(), strict=True):
            if identity in trained:
                raise fault(path, None, f"an identity that {FOLDERS['train']} does not have", str(identity))
    return market
