"""Data sets: readers of what people have on disk, and the glyph–name set, rendered from installed fonts.

`load_precomputed` (Flickr30K and COCO region features), `load_market1501`, `load_cub200`, `load_sop`; `load_glyphs`
needs the extra `gssf_triton[data]`.
"""

from __future__ import annotations

from gssf_triton.data.files import DataError, LabelledImages
from gssf_triton.data.fine_grained import RetrievalSplits, load_cub200, load_sop
from gssf_triton.data.glyphs import Glyphs, load_glyphs
from gssf_triton.data.market1501 import Market1501, PersonImages, load_market1501
from gssf_triton.data.precomputed import PrecomputedFeatures, load_precomputed

__all__ = [
    "DataError",
    "Glyphs",
    "LabelledImages",
    "Market1501",
    "PersonImages",
    "PrecomputedFeatures",
    "RetrievalSplits",
    "load_cub200",
    "load_glyphs",
    "load_market1501",
    "load_precomputed",
    "load_sop",
]
