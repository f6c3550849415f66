"""A search as it was asked for: checked once, and then one value all the way down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gssf_triton import checks
from gssf_triton.metric import Metric
from gssf_triton.once import Plainly

#: The fields that say which items are left out and which match, each of them optional.
LABELS = ("exclude", "mask", "query_ids", "gallery_ids", "query_cams", "gallery_cams")


@dataclass(frozen=True)
class Query:
    """Queries (Q, D), a gallery (N, D) and their metric; which items are left out and, with ids, which match.

    `exclude` (Q,) holds the gallery index of one item, −1 for none; `mask` (Q, N) is True where an item may be ranked;
    with cameras an item of the query's identity and camera is left out. `offset` is the index of the gallery's first
    item where it is one shard of a larger gallery; columns count from that item.
    """

    queries: Tensor
    gallery: Tensor | np.ndarray
    W_diag: Tensor | None
    W_blocks: Tensor | None
    normalize: bool
    backend: str
    _: KW_ONLY
    exclude: Tensor | None = None
    mask: Tensor | None = None
    query_ids: Tensor | None = None
    gallery_ids: Tensor | None = None
    query_cams: Tensor | None = None
    gallery_cams: Tensor | None = None
    offset: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(Q, N)."""
        return self.queries.shape[0], int(self.gallery.shape[0])

    @property
    def metric(self) -> Metric:
        return Metric(self.W_diag, self.W_blocks)

    def on_plain_tensors(self, search: Callable[[Query], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`search(self)`, without a gradient; under `torch.func.vmap` one call for each item of the batch."""
        names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            return search(replace(self, **dict(zip(names, tensors, strict=True))))  # type: ignore[arg-type]

        return Plainly(call)(*(getattr(self, name) for name in names))

    def same_id(self, rows: slice, columns: slice) -> Tensor:
        """(r, c): True where query and item are of one identity, left out or not."""
        assert self.query_ids is not None and self.gallery_ids is not None
        return self.query_ids[rows, None] == self.gallery_ids[None, columns]

    def may_match(self, rows: slice, columns: slice) -> bool:
        """False where no identity is on both sides."""
        assert self.query_ids is not None and self.gallery_ids is not None
        return bool(torch.isin(self.query_ids[rows], self.gallery_ids[columns]).any())

    def matches(self, rows: slice, columns: slice) -> Tensor:
        """(r, c): True where an item is a match and is not left out."""
        match, dropped = self.same_id(rows, columns), self.dropped(rows, columns)
        return match if dropped is None else match.logical_and_(~dropped)

    def dropped(self, rows: slice, columns: slice) -> Tensor | None:
        """(r, c): True where an item is left out; None where none is."""
        found = None
        if self.mask is not None:
            found = ~self.mask[rows, columns]
        if self.query_cams is not None and self.gallery_cams is not None:
            same_camera = self.query_cams[rows, None] == self.gallery_cams[None, columns]
            same_camera &= self.same_id(rows, columns)
            found = same_camera if found is None else found | same_camera
        if self.exclude is not None:
            column = self.exclude[rows] - self.offset - columns.start
            width = columns.stop - columns.start
            (hit,) = ((column >= 0) & (column < width)).nonzero(as_tuple=True)
            if hit.numel():
                if found is None:
                    found = torch.zeros((column.shape[0], width), dtype=torch.bool, device=column.device)
                found[hit, column[hit]] = True
        return found


def checked(query: Query, *needs: str, arrays: bool = True) -> Query:
    """The same query with its arguments checked, labels as int64 and the mask as booleans.

    `needs` names the fields of `LABELS` that must be given. With `arrays` the gallery may be a NumPy array.
    """
    queries, gallery, names = query.queries, query.gallery, ("queries", "gallery")
    if arrays and isinstance(gallery, np.ndarray):
        checks.check_matrix("queries", checks.check_features("queries", queries), "(Q, D)")
        checks.check_gallery_array(queries, gallery)
    else:
        checks.check_pair(queries, gallery, names)
        assert isinstance(gallery, Tensor)
        checks.check_matrix("queries", queries, "(Q, D)")
        checks.check_matrix("gallery", gallery, "(N, D)")
        checks.check_same_dtype(queries, gallery, names)
    checks.check_weights("queries", queries, query.W_diag, query.W_blocks)
    for name in needs:
        checks.check_tensor(name, getattr(query, name))
    if (query.query_cams is None) != (query.gallery_cams is None):
        missing = "query_cams" if query.query_cams is None else "gallery_cams"
        raise ValueError(f"query_cams and gallery_cams must be given together, got None for {missing}")
    found: dict[str, Any] = {}
    for name in LABELS:
        value = getattr(query, name)
        if name == "mask" and value is not None:
            found[name] = checks.check_pair_mask(name, value, query.shape, queries)
        elif value is not None:
            side, count = names[name.startswith("gallery")], query.shape[name.startswith("gallery")]
            found[name] = checks.check_labels(name, value, count, side, queries)
    checks.check_flags(normalize=query.normalize)
    return replace(query, **found)
