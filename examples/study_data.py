"""The studies' data: the glyph–name set, and the readers' data sets in the same form."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from glyph_model import MAX_WORDS, tokenize
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gssf_triton.data import Glyphs, load_cub200, load_glyphs, load_market1501, load_precomputed, load_sop
from gssf_triton.storage import reason, regular, replacing, unusable

#: Words of a caption that are used; a glyph's name has at most MAX_WORDS.
CAPTION_WORDS = 24
#: Side of the square that photographs are scaled to.
PHOTO_SIZE = 64

Ids = NDArray[np.int64]


class Groups:
    """Items by group. Draws items of distinct groups, so that a batch has no false negative."""

    def __init__(self, ids: Ids) -> None:
        self.groups, counts = np.unique(ids, return_counts=True)
        self.order = torch.from_numpy(np.argsort(ids, kind="stable"))
        self.counts = torch.from_numpy(counts)
        self.starts = torch.from_numpy(np.cumsum(counts) - counts)

    def __len__(self) -> int:
        return len(self.groups)

    def draw(self, groups: Tensor, generator: torch.Generator, views: int = 1) -> tuple[Tensor, ...]:
        """`views` different items of each group; the same one again if a group has only one."""
        counts = self.counts[groups]
        first = (torch.rand(len(groups), generator=generator) * counts).long()
        places = [first]
        if views == 2:
            step = 1 + (torch.rand(len(groups), generator=generator) * (counts - 1)).long()
            places.append((first + step) % counts)
        return tuple(self.order[self.starts[groups] + place] for place in places)


def take(images: NDArray[Any], rows: Tensor) -> Tensor:
    """Rows of an array, memory-mapped or not, as float32: bytes become [0, 1], channels come first."""
    chosen = torch.from_numpy(np.array(images[rows.numpy()]))
    if chosen.dtype != torch.uint8:
        return chosen.float()
    if chosen.dim() == 4:
        chosen = chosen.movedim(-1, 1)
    return chosen.float() / 255


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """A shift of up to two pixels: a glyph's position carries no information."""
    dy, dx = (int(torch.randint(-2, 3, (), generator=generator)) for _ in range(2))
    return torch.roll(images, (dy, dx), (-2, -1))


@dataclass(frozen=True)
class Pairs:
    """Images and texts; those of equal ids, 0 to n − 1, belong together.

    Attributes:
        images: (n, 32, 32) bytes, or (n, R, D) features, perhaps memory-mapped.
        image_ids: (n,).
        texts: The m captions.
        text_ids: (m,).
        max_words: Words of a caption that are used.
    """

    images: NDArray[Any]
    image_ids: Ids
    texts: tuple[str, ...]
    text_ids: Ids
    max_words: int = MAX_WORDS

    def tokens(self, rows: Tensor) -> Tensor:
        return tokenize([self.texts[i] for i in rows.tolist()], self.max_words)


@dataclass(frozen=True)
class Labelled:
    """Images, their classes or identities, and their cameras or typefaces."""

    images: NDArray[Any]
    ids: Ids
    cams: Ids

    def only(self, rows: NDArray[Any]) -> Labelled:
        return Labelled(self.images[rows], self.ids[rows], self.cams[rows])


@dataclass(frozen=True)
class Source:
    """Where a study's data comes from.

    Attributes:
        data: "glyphs", or the name of a data set that gssf_triton.data reads.
        root: Its folder.
        cache: Folder for decoded photographs and pretrained towers.
        held_out: Test names of the glyph set.
        limit: How many of the glyph set's names to use, spread evenly (0: all).
        tower_steps: Steps of the towers that some studies train before any column's turn (0: the study's own).
    """

    data: str = "glyphs"
    root: Path | None = None
    cache: Path = Path("runs/studies")
    held_out: int = 1000
    limit: int = 0
    tower_steps: int = 0

    def glyphs(self) -> Glyphs:
        return _glyphs(self.limit)


@functools.lru_cache(maxsize=2)
def _glyphs(limit: int) -> Glyphs:
    glyphs = load_glyphs()
    if not limit:
        return glyphs
    return glyphs.only(np.linspace(0, len(glyphs.names) - 1, limit).astype(np.int64))


def one_image_a_name(glyphs: Glyphs, seed: int) -> Glyphs:
    """The set with one image of each name, in a typeface drawn by `seed`."""
    generator = np.random.default_rng(seed)
    groups = Groups(glyphs.name_ids)
    starts, counts = groups.starts.numpy(), groups.counts.numpy()
    rows = groups.order.numpy()[starts + (generator.random(len(counts)) * counts).astype(np.int64)]
    return Glyphs(glyphs.images[rows], glyphs.name_ids[rows], glyphs.typeface_ids[rows], glyphs.names, glyphs.typefaces)


def glyph_pairs(glyphs: Glyphs) -> Pairs:
    return Pairs(glyphs.images, glyphs.name_ids, glyphs.names, np.arange(len(glyphs.names)))


def image_text_pairs(source: Source, seed: int) -> tuple[Pairs, Pairs]:
    """(train, test): other unseen names for each seed, or the data set's own split."""
    if source.data == "glyphs":
        train, test = source.glyphs().split(source.held_out, seed)
        return glyph_pairs(train), glyph_pairs(one_image_a_name(test, seed))
    assert source.root is not None
    parts = (load_precomputed(source.root, source.data, split) for split in ("train", "test"))
    train_part, test_part = (
        Pairs(part.images, np.arange(len(part)), part.captions, part.image_ids, CAPTION_WORDS) for part in parts
    )
    return train_part, test_part


#: The scripts and typefaces that the frozen-feature study keeps for the metric. The towers learn from the others.
NEW_SCRIPTS = ("GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "BOX", "CIRCLED", "LEFTWARDS", "RIGHTWARDS", "MODIFIER")
NEW_TYPEFACES = ("DejaVuSerif", "STIX")


def transfer_pairs(source: Source, seed: int) -> tuple[Pairs, Pairs, Pairs]:
    """(the towers' part, the metric's part, test). Flickr30K and COCO: train, dev, test.

    Glyphs: most scripts in sans-serif faces for the towers; the other scripts in serif faces for the metric and the
    test, which have different names for each seed.
    """
    if source.data != "glyphs":
        assert source.root is not None
        first, second, third = (
            Pairs(part.images, np.arange(len(part)), part.captions, part.image_ids, CAPTION_WORDS)
            for part in (load_precomputed(source.root, source.data, split) for split in ("train", "dev", "test"))
        )
        return first, second, third
    glyphs = source.glyphs()
    is_new_face = np.array([face.startswith(NEW_TYPEFACES) for face in glyphs.typefaces])[glyphs.typeface_ids]
    is_new_name = np.array([name.startswith(NEW_SCRIPTS) for name in glyphs.names])[glyphs.name_ids]
    worlds = []
    for kept in (~is_new_face & ~is_new_name, is_new_face & is_new_name):
        part = Glyphs(
            glyphs.images[kept], glyphs.name_ids[kept], glyphs.typeface_ids[kept], glyphs.names, glyphs.typefaces
        )
        worlds.append(part.only(np.unique(part.name_ids)))
    train, test = worlds[1].split(min(source.held_out, len(worlds[1].names) // 2), seed)
    return glyph_pairs(worlds[0]), glyph_pairs(train), glyph_pairs(one_image_a_name(test, seed))


def photographs(paths: tuple[Path, ...], cache: Path) -> NDArray[np.uint8]:
    """(n, 64, 64, 3) bytes, decoded once into `cache` and memory-mapped from there."""
    from PIL import Image

    key = hashlib.sha256("\n".join(f"{path} {path.stat().st_size}" for path in paths).encode()).hexdigest()[:16]
    kept = cache / f"photographs-{PHOTO_SIZE}-{key}.npy"
    shape = (len(paths), PHOTO_SIZE, PHOTO_SIZE, 3)
    if kept.exists():
        try:
            return _kept_photographs(kept, shape)
        except ValueError as fault:
            warnings.warn(f"{fault}: decoded again", stacklevel=2)
            if not kept.is_file():
                kept.unlink()
    with replacing(kept) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for path in tqdm(paths, desc="decoding images", unit="image", leave=False):
            with Image.open(path) as image:
                small = image.convert("RGB").resize((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.BOX)
            file.write(small.tobytes())
    return _kept_photographs(kept, shape)


def _kept_photographs(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The cache, memory-mapped.

    Raises:
        ValueError: it is damaged, or of other images.
    """
    expected = f"the decoded photographs, bytes of shape {shape}"
    try:
        images: NDArray[np.uint8] = np.load(regular(path), mmap_mode="r", allow_pickle=False)
    # A damaged header can raise almost any exception.
    except Exception as error:
        raise unusable(path, expected, f"a file that cannot be read ({reason(error)})") from error
    if not isinstance(images, np.ndarray) or images.shape != shape or images.dtype != np.uint8:
        raise unusable(path, expected, "something else")
    return images


def _with_two_images(part: Labelled) -> Labelled:
    _, place, counts = np.unique(part.ids, return_inverse=True, return_counts=True)
    return part.only(np.flatnonzero(counts[place] > 1))


def _glyph_labels(source: Source, seed: int, chosen: Callable[[str], bool]) -> tuple[Labelled, Labelled]:
    """(train, test) with no character in both; characters with only one image are left out."""
    glyphs = source.glyphs()
    glyphs = glyphs.only(np.array([i for i, name in enumerate(glyphs.names) if chosen(name)]))
    train, test = (
        _with_two_images(Labelled(part.images, part.name_ids, part.typeface_ids))
        for part in glyphs.split(min(source.held_out, len(glyphs.names) // 2), seed)
    )
    return train, test


def reid_parts(source: Source, seed: int) -> tuple[Labelled, Labelled, Labelled]:
    """(train, query, gallery). Glyphs: identity = character, camera = typeface, one query a character."""
    if source.data == "glyphs":
        train, test = _glyph_labels(source, seed, lambda name: True)
        generator = np.random.default_rng(seed)
        groups = Groups(test.ids)
        counts = groups.counts.numpy()
        drawn = groups.starts.numpy() + (generator.random(len(counts)) * counts).astype(np.int64)
        is_query = np.zeros(len(test.ids), dtype=bool)
        is_query[groups.order.numpy()[drawn]] = True
        return train, test.only(np.flatnonzero(is_query)), test.only(np.flatnonzero(~is_query))
    assert source.root is not None
    market = load_market1501(source.root)
    parts = (market.train, market.query, market.gallery)
    train, query, gallery = (Labelled(photographs(part.paths, source.cache), part.ids, part.cams) for part in parts)
    return train, query, gallery


#: Alphabets with families of letters that differ only in an accent, a hook or a stroke.
ALPHABETS = ("LATIN", "GREEK", "CYRILLIC")


def fine_grained_parts(source: Source, seed: int) -> tuple[Labelled, Labelled]:
    """(train, test), disjoint classes. Glyphs: half of the letters of three alphabets each."""
    if source.data == "glyphs":
        return _glyph_labels(source, seed, lambda name: name.startswith(ALPHABETS))
    assert source.root is not None
    splits = {"cub": load_cub200, "sop": load_sop}[source.data](source.root)
    parts = (
        Labelled(photographs(part.paths, source.cache), part.labels, np.zeros_like(part.labels))
        for part in (splits.train, splits.test)
    )
    train, test = parts
    return train, test
