"""The glyph–name set: images of characters and their Unicode names, rendered from fonts every matplotlib user has.

54,284 real 32×32 glyph images of 7,354 names ("GREEK SMALL LETTER ALPHA WITH TONOS"), most in several faces, with no
download: matplotlib ships the DejaVu and STIX fonts, Python ships `unicodedata.name`. Names are compositional, so
retrieving names never seen in training is possible, and hard.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gssf_triton.checks import check_count, check_flags
from gssf_triton.optional import require
from gssf_triton.progress import bar
from gssf_triton.storage import CACHE_VARIABLE, cache_folder, read_npz, replacing, unusable, warn_once

IMAGE_SIZE = 32
#: Point size at 72 dpi: capitals take about 15 of the 32 pixels, which leaves room for accents. Larger ones are scaled.
FONT_SIZE = 20
#: To be increased whenever the rendering or the file's layout changes, so that old cache files are not used.
FORMAT = 1
TYPEFACES = ("DejaVu", "STIXGeneral")


@dataclass(frozen=True)
class Glyphs:
    """Images of named characters.

    Attributes:
        images: (n, 32, 32) uint8, ink 255 on 0.
        name_ids: (n,) int64, each image's place in `names`.
        typeface_ids: (n,) int64, each image's place in `typefaces`.
        names: The distinct Unicode names, sorted.
        typefaces: The font faces' file names without ending, sorted.
    """

    images: NDArray[np.uint8]
    name_ids: NDArray[np.int64]
    typeface_ids: NDArray[np.int64]
    names: tuple[str, ...]
    typefaces: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def only(self, name_ids: NDArray[np.int64]) -> Glyphs:
        """The images of these names, which are renumbered in the order given."""
        place = np.full(len(self.names), -1, dtype=np.int64)
        place[name_ids] = np.arange(len(name_ids))
        kept = place[self.name_ids] >= 0
        names = tuple(self.names[i] for i in name_ids)
        return Glyphs(self.images[kept], place[self.name_ids[kept]], self.typeface_ids[kept], names, self.typefaces)

    def split(self, held_out: int = 1000, seed: int = 0) -> tuple[Glyphs, Glyphs]:
        """(train, test) with no name in both: `held_out` names, drawn by `seed`, are in test only.

        Raises:
            ValueError: `held_out` is not between 1 and the number of names less one.
        """
        check_count("held_out", held_out, 1, len(self.names) - 1)
        check_count("seed", seed, 0)
        order = np.random.default_rng(seed).permutation(len(self.names))
        return self.only(np.sort(order[held_out:])), self.only(np.sort(order[:held_out]))


def _centred(bitmap: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inked part of a bitmap in the middle of a 32×32 image, scaled down if it is larger."""
    rows, columns = np.flatnonzero(bitmap.any(1)), np.flatnonzero(bitmap.any(0))
    ink = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if max(ink.shape) > IMAGE_SIZE:
        from PIL import Image

        scale = IMAGE_SIZE / max(ink.shape)
        size = (max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale)))
        ink = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BOX))
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    top, left = (IMAGE_SIZE - ink.shape[0]) // 2, (IMAGE_SIZE - ink.shape[1]) // 2
    image[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return image


def render(progress: bool = True) -> Glyphs:
    """Render every named character of matplotlib's DejaVu and STIX faces; some seconds, the same every time."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = sorted(path for path in folder.glob("*.ttf") if path.name.startswith(TYPEFACES))
    images, names, typeface_ids = [], [], []
    for typeface, path in enumerate(bar(faces, desc="rendering glyphs", unit="face", disable=not progress)):
        font = FT2Font(str(path))
        font.set_size(FONT_SIZE, 72)
        for code, glyph in sorted(font.get_charmap().items()):
            name = unicodedata.name(chr(code), None)
            if name is None or glyph == 0:  # no name (private use), or the missing glyph's box
                continue
            font.set_text(chr(code))
            font.draw_glyphs_to_bitmap()
            bitmap = np.asarray(font.get_image())
            if bitmap.size == 0 or not bitmap.any():  # spaces and other characters without ink
                continue
            images.append(_centred(bitmap))
            names.append(name)
            typeface_ids.append(typeface)
    distinct, name_ids = np.unique(np.array(names), return_inverse=True)
    return Glyphs(
        np.stack(images),
        name_ids.astype(np.int64).reshape(-1),
        np.array(typeface_ids, dtype=np.int64),
        tuple(str(name) for name in distinct),
        tuple(path.stem for path in faces),
    )


def cache_path() -> Path | None:
    """The file of the rendered set in `storage.cache_folder`; None if there is no such folder."""
    matplotlib = require("matplotlib", "data")
    folder = cache_folder()
    return folder and folder / f"glyphs-v{FORMAT}-mpl{matplotlib.__version__}-ucd{unicodedata.unidata_version}.npz"


def _read(path: Path) -> Glyphs:
    """Read a cache file. ValueError or OSError if it is not whole."""
    arrays = read_npz(path)
    expected = "a whole glyph set"
    keys = ("images", "name_ids", "typeface_ids", "names", "typefaces")
    if missing := [key for key in keys if key not in arrays]:
        raise unusable(path, expected, f"one without {', '.join(missing)}")
    images, name_ids, typeface_ids, names, typefaces = (arrays[key] for key in keys)
    whole = (
        images.ndim == 3
        and name_ids.ndim == typeface_ids.ndim == names.ndim == typefaces.ndim == 1
        and name_ids.dtype == typeface_ids.dtype == np.int64
        and names.dtype.kind == typefaces.dtype.kind == "U"
        and images.shape[1:] == (IMAGE_SIZE, IMAGE_SIZE)
        and images.dtype == np.uint8
        and len(images) == len(name_ids) == len(typeface_ids) > 0
        and name_ids.min() >= 0
        and name_ids.max() < len(names)
        and typeface_ids.min() >= 0
        and typeface_ids.max() < len(typefaces)
    )
    if not whole:
        raise unusable(path, expected, "one of other shapes or types")
    return Glyphs(images, name_ids, typeface_ids, tuple(names.tolist()), tuple(typefaces.tolist()))


def _write(path: Path, glyphs: Glyphs) -> None:
    with replacing(path) as file:
        np.savez(
            file,
            images=glyphs.images,
            name_ids=glyphs.name_ids,
            typeface_ids=glyphs.typeface_ids,
            names=np.array(glyphs.names),
            typefaces=np.array(glyphs.typefaces),
        )


def load_glyphs(progress: bool = True) -> Glyphs:
    """The glyph–name set, from the cache, or rendered and cached at the first call.

    A cache file that cannot be read is renamed to `….bad` and rebuilt, with a warning. If the cache directory cannot be
    written to, the set is rendered at each call, with one warning.

    Example:
        >>> from gssf_triton.data.glyphs import load_glyphs
        >>> glyphs = load_glyphs(progress=False)
        >>> glyphs.images.shape[1:], "GREEK SMALL LETTER ALPHA WITH TONOS" in glyphs.names
        ((32, 32), True)
    """
    check_flags(progress=progress)
    path = cache_path()
    if path is None:
        warn_once(
            "glyphs", f"this user has no cache directory, the glyph set is not kept: {CACHE_VARIABLE} chooses one"
        )
        return render(progress)
    # Not path.exists(), which raises if the folder may not be searched.
    if os.path.exists(path):
        try:
            return _read(path)
        except (OSError, ValueError) as fault:
            aside = path.with_suffix(".bad")
            warnings.warn(f"the glyph cache {path} is unreadable ({fault}): set aside as {aside.name}", stacklevel=2)
            try:
                os.replace(path, aside)
            except OSError as refusal:
                warnings.warn(f"the unreadable glyph cache could not be moved ({refusal})", stacklevel=2)
    glyphs = render(progress)
    try:
        _write(path, glyphs)
    except OSError as refusal:
        warn_once(("glyphs", path), f"the glyph set could not be cached in {path.parent} ({refusal})")
    return glyphs
