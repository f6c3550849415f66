"""Scores of queries against a gallery, chunk by chunk: the metric folded once, the gallery never copied.

The queries are folded, whatever the two sides' sizes: the fold is B / N of the product's work, a gallery may lie on
disk or in other processes, and a score must not depend on how the gallery is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gssf_triton.constants import NORM_EPS
from gssf_triton.kernels import retrieval_configs
from gssf_triton.kernels.retrieval_configs import StreamChunks
from gssf_triton.precision import HEADROOM, float16_unit, full_precision
from gssf_triton.progress import Tick, no_tick
from gssf_triton.similarity.functional import fold_rows
from gssf_triton.similarity.torch_backend import accumulate_dtype

#: torch's names for the array dtypes a gallery on disk may have.
ARRAY_DTYPES = {np.dtype("f2"): torch.float16, np.dtype("f4"): torch.float32, np.dtype("f8"): torch.float64}


#: On a GPU torch sums a few rows by more threads a row than many, in another order: a copy of an item in a gallery's
#: last, short block would have another norm and be no tie. Blocks have as many rows as this, at least.
STEADY_ROWS = 64


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """`start:stop` in pieces of `step`, the last one shorter."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


@dataclass(frozen=True)
class Gallery:
    """Gallery rows (N, D): a tensor, or an array that is read block by block.

    `offset` is the index of the first row, where the gallery is one shard of a larger one.
    """

    source: Tensor | np.ndarray
    device: torch.device
    offset: int = 0

    def __len__(self) -> int:
        return int(self.source.shape[0])

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, block on the device), in order; a tensor is one block.

        An array passes through one buffer, on a GPU through two pinned ones: while a block is worked on, the next is
        read from disk and then copied on a stream of its own. A block is valid until the next is asked for.
        """
        if isinstance(self.source, Tensor):
            yield 0, self.source.detach()
        elif self.device.type == "cuda":
            yield from self._blocks_ahead(rows)
        else:
            buffer = self._buffer(rows)
            for part in slices(0, len(self), rows):
                yield part.start, self._read(part, buffer).to(self.device)

    def _buffer(self, rows: int) -> Tensor:
        assert isinstance(self.source, np.ndarray)
        dtype = ARRAY_DTYPES[self.source.dtype.newbyteorder("=")]
        shape = (min(rows, len(self)), self.source.shape[1])
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def _read(self, part: slice, buffer: Tensor) -> Tensor:
        assert isinstance(self.source, np.ndarray)
        filled = buffer[: part.stop - part.start]
        np.copyto(filled.numpy(), self.source[part])
        return filled

    def _blocks_ahead(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        stream = torch.cuda.Stream(self.device)
        buffers = [self._buffer(rows) for _ in range(2)]
        copied = [torch.cuda.Event() for _ in buffers]

        def load(number: int, part: slice) -> Tensor:
            buffer, done = buffers[number % 2], copied[number % 2]
            done.synchronize()  # the copy out of this buffer, two blocks ago
            host = self._read(part, buffer)
            with torch.cuda.stream(stream):
                block = host.to(self.device, non_blocking=True)
                done.record(stream)
            return block

        parts = list(slices(0, len(self), rows))
        block = load(0, parts[0]) if parts else None
        for number, part in enumerate(parts):
            assert block is not None
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied[number % 2])
            block.record_stream(current)
            yield part.start, block
            block = load(number + 1, parts[number + 1]) if number + 1 < len(parts) else None


@dataclass(frozen=True)
class Exclusions:
    """Which gallery items a query may not be ranked against, and, where ids are given, which are its matches.

    `exclude` (Q,) holds the gallery index of one item, −1 for none; `mask` (Q, N) is True where an item may be ranked;
    with cameras an item of the query's identity and camera is dropped. Columns here count from the shard's first row.
    """

    exclude: Tensor | None = None
    mask: Tensor | None = None
    query_ids: Tensor | None = None
    gallery_ids: Tensor | None = None
    query_cams: Tensor | None = None
    gallery_cams: Tensor | None = None

    def same_id(self, rows: slice, columns: slice) -> Tensor:
        """(r, c): True where query and item are of one identity, dropped or not."""
        assert self.query_ids is not None and self.gallery_ids is not None
        return self.query_ids[rows, None] == self.gallery_ids[None, columns]

    def may_match(self, rows: slice, columns: slice) -> bool:
        """False where no identity is on both sides."""
        assert self.query_ids is not None and self.gallery_ids is not None
        return bool(torch.isin(self.query_ids[rows], self.gallery_ids[columns]).any())

    def dropped(self, rows: slice, columns: slice, offset: int) -> Tensor | None:
        """(r, c): True where the item may not be ranked; None where all may."""
        found = None
        if self.mask is not None:
            found = ~self.mask[rows, columns]
        if self.query_cams is not None:
            assert self.gallery_cams is not None
            same_camera = self.query_cams[rows, None] == self.gallery_cams[None, columns]
            same_camera &= self.same_id(rows, columns)
            found = same_camera if found is None else found | same_camera
        if self.exclude is not None:
            column = self.exclude[rows] - offset - columns.start
            width = columns.stop - columns.start
            (hit,) = ((column >= 0) & (column < width)).nonzero(as_tuple=True)
            if hit.numel():
                if found is None:
                    found = torch.zeros((column.shape[0], width), dtype=torch.bool, device=column.device)
                found[hit, column[hit]] = True
        return found


class Scores:
    """S of folded queries (Q, D) against blocks of a gallery, by torch's product or by the one-pass kernel.

    Scores are float32, or float64 for float64 features, whatever the features' dtype: ranking by rounded scores would
    make ties of scores that differ; torch.autocast has no part in them. With `normalize` the queries' norms are in the
    fold, the gallery's scale S.

    Every product has the same shape for a batch of queries, whatever columns are asked for: a library may sum in
    another order for another shape, and copies of one item would no longer be ties. `N` is the gallery's size.
    """

    def __init__(
        self, queries: Tensor, N: int, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, backend: str
    ) -> None:
        self.dtype = accumulate_dtype(queries.dtype)
        self.backend, self.normalize = backend, normalize
        #: Told of every query–item pair that was scored.
        self.tick: Tick = no_tick
        W_diag, W_blocks = (None if w is None else w.detach() for w in (W_diag, W_blocks))
        folded = fold_rows(queries.detach(), W_diag, W_blocks, normalize, backend=backend)
        #: What queries were divided by to fit float16, powers of two (Q, 1), and scores with them: no rank changes.
        self.units: Tensor | None = None
        if backend == "triton" and queries.dtype == torch.float16:
            self.units = float16_unit(folded, dim=1)
            folded = folded / self.units
        self.headroom = HEADROOM if normalize and self.units is None else 1.0
        self.queries = (folded / self.headroom).to(queries.dtype if backend == "triton" else self.dtype)
        Q, D = queries.shape
        self.chunks: StreamChunks = retrieval_configs.stream_chunks(
            Q, N, D, queries.dtype.itemsize, queries.device.type
        )

    def rows(self) -> Iterator[slice]:
        return slices(0, self.queries.shape[0], self.chunks.rows)

    def scale(self, block: Tensor) -> Tensor | None:
        """1 / max(‖y‖₂, 1e-12) of every row of the block, or None where nothing is normalised.

        0 where the norm overflows: such a row scores 0, as torch.nn.functional.normalize has it.
        """
        if not self.normalize:
            return None
        few = max(STEADY_ROWS - block.shape[0], 0)
        rows = torch.cat((block, block.new_zeros(few, block.shape[1]))) if few else block
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=self.dtype)[: block.shape[0]]
        return norms.clamp_min(NORM_EPS).reciprocal().mul_(self.headroom)

    def values(self, scores: Tensor) -> Tensor:
        """The similarities, of scores (Q, k)."""
        return scores if self.units is None else scores * self.units

    def fill(self, out: Tensor, rows: slice, block: Tensor, columns: slice, scale: Tensor | None) -> Tensor:
        """`out` (r, c) with the scores of these rows and these columns of the block, at most a chunk of them."""
        queries, items = self.queries[rows], block[columns]
        self.tick(queries.shape[0] * items.shape[0])
        if self.backend == "triton":
            from gssf_triton.kernels.launch import Metric
            from gssf_triton.kernels.pairwise import pairwise

            pairwise(queries[None], items[None], Metric(None, None), False, out[None])
        elif items.shape[0] == self.chunks.columns:
            with full_precision(queries):
                torch.mm(queries, items.to(self.dtype).mT, out=out)
        else:
            filled = items.new_zeros((self.chunks.columns, items.shape[1]), dtype=self.dtype)
            filled[: items.shape[0]] = items
            with full_precision(queries):
                out.copy_(torch.mm(queries, filled.mT)[:, : items.shape[0]])
        return out if scale is None else out.mul_(scale[columns])
