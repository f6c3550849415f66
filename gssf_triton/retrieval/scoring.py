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
from gssf_triton.metric import accumulate_dtype
from gssf_triton.precision import HEADROOM, full_precision
from gssf_triton.progress import Tick, no_tick
from gssf_triton.retrieval.query import Query
from gssf_triton.similarity.functional import fold_rows
from gssf_triton.slices import slices

#: torch's names for the array dtypes a gallery on disk may have.
ARRAY_DTYPES = {np.dtype("f2"): torch.float16, np.dtype("f4"): torch.float32, np.dtype("f8"): torch.float64}

#: On a GPU torch sums a few rows by more threads a row than many, in another order: a copy of an item in a gallery's
#: last, short block would have another norm and be no tie. Blocks have as many rows as this, at least.
STEADY_ROWS = 64


def read_blocks(gallery: Tensor | np.ndarray, rows: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, block of at most `rows` rows on the device), in order; a tensor is one block.

    An array passes through one buffer, on a GPU through two pinned ones: while a block is worked on, the next is read
    from disk and then copied on a stream of its own. A block is valid until the next is asked for.
    """
    if isinstance(gallery, Tensor):
        yield 0, gallery.detach()
        return
    on_gpu, shape = device.type == "cuda", (min(rows, gallery.shape[0]), gallery.shape[1])
    dtype = ARRAY_DTYPES[gallery.dtype.newbyteorder("=")]
    buffers = [torch.empty(shape, dtype=dtype, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]

    def read(part: slice, buffer: Tensor) -> Tensor:
        filled = buffer[: part.stop - part.start]
        np.copyto(filled.numpy(), gallery[part])
        return filled

    parts = list(slices(0, gallery.shape[0], rows))
    if not on_gpu:
        for part in parts:
            yield part.start, read(part, buffers[0]).to(device)
        return
    stream, copied = torch.cuda.Stream(device), [torch.cuda.Event() for _ in buffers]

    def load(number: int) -> Tensor:
        done = copied[number % 2]
        done.synchronize()  # the copy out of this buffer, two blocks ago
        host = read(parts[number], buffers[number % 2])
        with torch.cuda.stream(stream):
            block = host.to(device, non_blocking=True)
            done.record(stream)
        return block

    block = load(0) if parts else None
    for number, part in enumerate(parts):
        assert block is not None
        current = torch.cuda.current_stream(device)
        current.wait_event(copied[number % 2])
        block.record_stream(current)
        yield part.start, block
        block = load(number + 1) if number + 1 < len(parts) else None


@dataclass(frozen=True)
class Block:
    """Items of the gallery on the device, those from `first` on, and what normalises their scores, (items,) or None."""

    first: int
    items: Tensor
    scale: Tensor | None

    def parts(self, step: int) -> Iterator[slice]:
        """The block's columns, `step` at a time."""
        return slices(self.first, self.first + self.items.shape[0], step)


class Scores:
    """S of folded queries (Q, D) against a gallery, by torch's product.

    Scores are float32, or float64 for float64 features, whatever the features' dtype: ranking by rounded scores would
    make ties of scores that differ; torch.autocast does not change them. With `normalize` the queries' norms are in the
    fold, the gallery's scale S.

    Every product has the same shape for a batch of queries, whatever columns are asked for: a library may sum in
    another order for another shape, and copies of one item would no longer be ties.
    """

    def __init__(self, query: Query) -> None:
        self.query, queries = query, query.queries
        self.dtype = accumulate_dtype(queries.dtype)
        #: Called with the number of query–item pairs that were scored.
        self.tick: Tick = no_tick
        metric = query.metric.map(Tensor.detach)
        folded = fold_rows(queries.detach(), metric, query.normalize, backend=query.backend)
        #: The folded queries were divided by it and the gallery's scale was multiplied: `HEADROOM`, or 1.
        self.headroom = HEADROOM if query.normalize else 1.0
        self.queries = self.operands(folded)
        (Q, N), D = query.shape, queries.shape[1]
        self.chunks: StreamChunks = retrieval_configs.stream_chunks(
            Q, N, D, queries.dtype.itemsize, queries.device.type
        )
        self._room = self.queries.new_empty(0, dtype=self.dtype)

    def operands(self, folded: Tensor) -> Tensor:
        """The folded queries as the product takes them."""
        return (folded / self.headroom).to(self.dtype)

    def values(self, scores: Tensor) -> Tensor:
        """The similarities, of scores (Q, k)."""
        return scores

    def rows(self) -> Iterator[slice]:
        return slices(0, self.queries.shape[0], self.chunks.rows)

    def blocks(self) -> Iterator[Block]:
        """The gallery in order; a block is valid until the next is asked for."""
        for first, items in read_blocks(self.query.gallery, self.chunks.block_rows, self.queries.device):
            yield Block(first, items, self._scale(items))

    def _scale(self, items: Tensor) -> Tensor | None:
        """1 / max(‖y‖₂, 1e-12) of every row, or None where nothing is normalised.

        0 where the norm overflows: such a row scores 0, as torch.nn.functional.normalize has it.
        """
        if not self.query.normalize:
            return None
        few = max(STEADY_ROWS - items.shape[0], 0)
        with full_precision(items):
            rows = torch.cat((items, items.new_zeros(few, items.shape[1]))) if few else items
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=self.dtype)[: items.shape[0]]
        return norms.clamp_min(NORM_EPS).reciprocal().mul_(self.headroom)

    def strips(self, rows: slice, width: int) -> Iterator[tuple[slice, slice]]:
        """The rows a few at a time, as `strip_rows` has it: (those rows, their place among `rows`)."""
        few = retrieval_configs.strip_rows(width, self.dtype.itemsize, self.queries.device.type)
        for some in slices(rows.start, rows.stop, few):
            yield some, slice(some.start - rows.start, some.stop - rows.start)

    def scored(self, rows: slice, block: Block, span: slice, multiple: int = 1) -> Tensor:
        """The scores (r, c) of these rows and of the columns `span` of the block, filled up with −inf to a `multiple`.

        They lie where those of the last call lay: a search holds one array of them.
        """
        queries, columns, count = self.queries[rows], self.chunks.columns, span.stop - span.start
        padded = -(-count // multiple) * multiple
        shape = (queries.shape[0], max(-(-count // columns) * columns, padded))
        if self._room.numel() < shape[0] * shape[1]:
            self.forget()  # never two of them
            self._room = self._room.new_empty(shape[0] * shape[1])
        out = self._room[: shape[0] * shape[1]].view(shape)
        for part in slices(span.start, span.stop, columns):
            place = slice(part.start - span.start, part.stop - span.start)
            items = slice(part.start - block.first, part.stop - block.first)
            self.tick(queries.shape[0] * (part.stop - part.start))
            self.multiply(queries, block.items[items], out[:, place.start : place.start + columns])
            if block.scale is not None:
                out[:, place].mul_(block.scale[items])
        out[:, count:padded] = float("-inf")
        return out[:, :padded]

    def forget(self) -> None:
        """Let the scores' array go."""
        self._room = self._room.new_empty(0)

    def multiply(self, queries: Tensor, items: Tensor, out: Tensor) -> None:
        """Fill the first c columns of `out` (r, a chunk's columns) with queries · itemsᵀ, of c items."""
        if items.shape[0] < self.chunks.columns:
            filled = items.new_zeros((self.chunks.columns, items.shape[1]), dtype=self.dtype)
            filled[: items.shape[0]] = items
            items = filled
        with full_precision(queries):
            torch.mm(queries, items.to(self.dtype).mT, out=out)
