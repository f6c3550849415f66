"""The glyph–name set: what is in it, how it is split, and a cache that is never trusted and never fatal."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gssf_triton.data import glyphs as module
from gssf_triton.data.glyphs import Glyphs, cache_path, load_glyphs


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return load_glyphs(progress=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, glyphs: Glyphs) -> Glyphs:
    """A tiny set that `render` gives at once, and a cache directory of its own."""
    tiny = glyphs.only(np.arange(5))
    monkeypatch.setattr(module, "render", lambda progress=True: tiny)
    monkeypatch.setenv("GSSF_CACHE_DIR", str(tmp_path / "cache"))
    return tiny


def same(x: Glyphs, y: Glyphs) -> bool:
    arrays = all(np.array_equal(getattr(x, key), getattr(y, key)) for key in ("images", "name_ids", "typeface_ids"))
    return arrays and x.names == y.names and x.typefaces == y.typefaces


def test_every_image_has_ink_and_a_unicode_name(glyphs: Glyphs) -> None:
    assert len(glyphs) > 50_000 and len(glyphs.names) > 7_000
    assert glyphs.images.reshape(len(glyphs), -1).max(1).min() > 0
    assert all(unicodedata.lookup(name) for name in glyphs.names[::97])
    assert all(face.startswith(("DejaVu", "STIXGeneral")) for face in glyphs.typefaces)


def test_most_names_come_in_several_typefaces(glyphs: Glyphs) -> None:
    assert np.median(np.bincount(glyphs.name_ids)) >= 5


def test_an_image_shows_its_own_character(glyphs: Glyphs) -> None:
    """A full block is ink all over; a full stop is a few pixels."""
    ink = {
        name: glyphs.images[glyphs.name_ids == glyphs.names.index(name)].mean() for name in ("FULL BLOCK", "FULL STOP")
    }
    assert ink["FULL BLOCK"] > 5 * ink["FULL STOP"]


def test_split_shares_no_name_and_loses_no_image(glyphs: Glyphs) -> None:
    train, test = glyphs.split(held_out=1000, seed=3)
    assert len(test.names) == 1000 and not set(train.names) & set(test.names)
    assert len(train) + len(test) == len(glyphs)
    assert same(test, glyphs.split(held_out=1000, seed=3)[1]) and not same(test, glyphs.split(held_out=1000, seed=4)[1])
    name = test.names[7]
    original = glyphs.images[glyphs.name_ids == glyphs.names.index(name)]
    assert np.array_equal(test.images[test.name_ids == 7], original)


@pytest.mark.parametrize("held_out", [0, -1, 10**6])
def test_split_says_what_it_takes(glyphs: Glyphs, held_out: int) -> None:
    with pytest.raises(ValueError, match=f"held_out must lie between 1 and .* got {held_out}"):
        glyphs.split(held_out)


def test_the_second_call_reads_the_cache(small: Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(load_glyphs(), small)

    def fail(progress: bool = True) -> Glyphs:
        raise AssertionError("rendered again")

    monkeypatch.setattr(module, "render", fail)
    assert same(load_glyphs(), small)
    assert [path.suffix for path in cache_path().parent.iterdir()] == [".npz"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign"])
def test_a_broken_cache_is_set_aside_and_rebuilt(small: Glyphs, damage: str) -> None:
    load_glyphs()
    path = cache_path()
    whole = path.read_bytes()
    if damage == "foreign":
        np.savez(
            path,
            images=np.zeros((2, 8, 8), np.uint8),
            name_ids=[0, 1],
            typeface_ids=[0, 0],
            names=["A"],
            typefaces=["B"],
        )
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a zip file"}[damage])
    with pytest.warns(UserWarning, match="set aside as"):
        assert same(load_glyphs(), small)
    assert path.with_suffix(".bad").exists()
    assert same(load_glyphs(), small)


def test_a_cache_that_cannot_be_written_costs_a_warning(small: Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="could not be cached .* No space left"):
        assert same(load_glyphs(), small)
    assert not list(cache_path().parent.iterdir()), "a half-written file is left behind"
