"""Region features and captions of Flickr30K and MS-COCO in the layout that SCAN and its successors share.

`{f30k,coco}_precomp/{train,dev,test,testall}_ims.npy`, n × 36 × 2048 region features, beside `…_caps.txt`, one caption
a line (Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gssf_triton.checks import check_choice
from gssf_triton.data.files import DataError, existing_file, existing_folder, fault, numbered_lines
from gssf_triton.storage import native

NAMES = ("f30k", "coco")
SPLITS = ("train", "dev", "test", "testall")
CAPTIONS_PER_IMAGE = 5
#: How many groups of rows `is_repeated` compares, and how far the rows of one group may differ: as a share of the
#: largest value, and of the distance between groups. The same image in five batches gives slightly different rows.
LOOKED_AT, OF_LARGEST, OF_DISTANCE = 16, 4e-3, 0.05


@dataclass(frozen=True)
class PrecomputedFeatures:
    """One split's image features and captions.

    Attributes:
        images: (n, R, D) float features of each image's R regions, memory-mapped: rows are read when they are used. A
            file in a foreign byte order is read whole.
        captions: The captions.
        image_ids: (len(captions),) int64, the row in `images` of each caption's image.
    """

    images: NDArray[np.floating]
    captions: tuple[str, ...]
    image_ids: NDArray[np.int64]
    #: The file of `images` and the step between its rows, for the process that unpickles this; None without a file.
    _file: tuple[Path, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.images)

    def __reduce__(self) -> tuple[Any, ...]:
        """Spawned workers of a data loader map the file, instead of being sent gigabytes."""
        if self._file is None:
            return PrecomputedFeatures, (self.images, self.captions, self.image_ids)
        return _mapped, (*self._file, self.captions, self.image_ids)


def _mapped(path: Path, every: int, captions: tuple[str, ...], image_ids: NDArray[np.int64]) -> PrecomputedFeatures:
    """The split whose images are each `every`-th row of a file."""
    made = PrecomputedFeatures(_features(path)[::every], captions, image_ids)
    object.__setattr__(made, "_file", (path, every))
    return made


def _features(path: Path) -> NDArray[np.floating]:
    expected = "an .npy array of floats, (images, regions, channels)"
    existing_file(path, expected)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # A damaged header can raise almost any exception.
    except Exception as error:
        # The size helps: NumPy's message about a truncated file does not say that it is truncated.
        raise fault(path, None, f"{expected}, whole", f"a file of {path.stat().st_size} bytes ({error})") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise fault(path, None, expected, "an .npz archive")
    if array.ndim != 3 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
        raise fault(path, None, expected, f"{array.dtype} of shape {array.shape}")
    return native(array)


def _apart(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """|a - b|, with distance 0 of NaN and Inf from themselves and ∞ from all else."""
    with np.errstate(invalid="ignore"):
        distance = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return np.nan_to_num(distance, nan=np.inf, posinf=np.inf)


def is_repeated(images: NDArray[np.floating]) -> bool:
    """Whether each image's row is repeated five times, once a caption, as in VSE++; compares a few groups of five."""
    groups, rest = divmod(len(images), CAPTIONS_PER_IMAGE)
    if rest or not groups:
        return False
    chosen = np.unique(np.linspace(0, groups - 1, LOOKED_AT).astype(np.int64))
    firsts = chosen * CAPTIONS_PER_IMAGE
    rows = np.stack([images[first : first + CAPTIONS_PER_IMAGE].astype(np.float64) for first in firsts])
    rows = rows.reshape(*rows.shape[:2], -1)
    within = _apart(rows, rows[:, :1]).max(initial=0)
    between = _apart(rows[1:, 0], rows[:-1, 0]).max(axis=1, initial=0)
    largest = np.abs(rows).max(initial=0, where=np.isfinite(rows))
    bounds = (OF_LARGEST * largest, OF_DISTANCE * np.median(between) if len(between) else np.inf)
    return bool(within <= min(bounds))


def load_precomputed(root: str | Path, name: str, split: str) -> PrecomputedFeatures:
    r"""Read one split of precomputed Flickr30K or COCO features; the features stay on disk until they are used.

    Args:
        root: The folder that has `{name}_precomp`, or that folder itself.
        name: "f30k" or "coco".
        split: "train", "dev", "test" or "testall" (COCO's 5,000 images).

    Returns:
        The split, with five captions an image or one. If each image's row is repeated five times, once a caption, every
        fifth row is kept.

    Raises:
        FileNotFoundError: a file or folder is missing.
        DataError: a file cut short, of another shape or type, a blank or undecodable caption (file and line are named),
            counts of images and captions that do not agree, or the folder of another set.
        ValueError: an unknown name or split.

    Source:
        Lee et al., Stacked Cross Attention, ECCV 2018 (arXiv 1803.08024), whose release fixed the layout.

    Example:
        >>> import tempfile, numpy as np
        >>> from pathlib import Path
        >>> from gssf_triton.data import load_precomputed
        >>> root = tempfile.TemporaryDirectory()
        >>> folder = Path(root.name) / "f30k_precomp"
        >>> folder.mkdir()
        >>> np.save(folder / "dev_ims.npy", np.zeros((2, 36, 2048), dtype=np.float32))
        >>> _ = (folder / "dev_caps.txt").write_text("A dog runs .\n" * 10)
        >>> dev = load_precomputed(root.name, "f30k", "dev")
        >>> dev.images.shape, len(dev.captions), dev.image_ids.tolist()
        ((2, 36, 2048), 10, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
        >>> root.cleanup()
    """
    check_choice("name", name, NAMES)
    check_choice("split", split, SPLITS)
    folder = existing_folder(root, f"{name}_precomp", f"{split}_ims.npy")
    file = (folder / f"{split}_ims.npy").resolve()
    others = [f"{other}_precomp" for other in NAMES if other != name]
    if folder.resolve().name.lower() in others:
        raise fault(folder, None, f"the features of {name}, {name}_precomp", "another set's folder")
    images = _features(file)
    every = 1
    path = folder / f"{split}_caps.txt"
    captions = tuple(text for _, text in numbered_lines(path, "a caption"))
    if len(captions) == CAPTIONS_PER_IMAGE * len(images):
        per_image = CAPTIONS_PER_IMAGE
    elif len(captions) != len(images):
        raise DataError(
            f"{path}, line {len(captions)}, its last: expected one caption or {CAPTIONS_PER_IMAGE} for each of the "
            f"{len(images)} images of {split}_ims.npy, {len(images)} or {CAPTIONS_PER_IMAGE * len(images)} lines, "
            f"got {len(captions)}"
        )
    elif is_repeated(images):
        every = per_image = CAPTIONS_PER_IMAGE
    else:
        per_image = 1
    return _mapped(file, every, captions, np.arange(len(captions), dtype=np.int64) // per_image)
