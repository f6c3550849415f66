"""The ways a call may be computed that shape and device choose among: plans, and chunks small enough to need many.

Small problems take one of them only; every result must hold in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from fuzz.draw import Draw
from gssf_triton.kernels import choice, retrieval_configs
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.plans import PLANS
from gssf_triton.region_word import pairs


class Way:
    """A way drawn; `taken()` is in force inside, forward and backward."""

    def __init__(self, d: Draw) -> None:
        self.plan = self.chunk = self.bytes = None
        self.stream: retrieval_configs.StreamChunks | None = None
        if d.maybe(0.5):
            return
        if d.small:
            self.plan = d.choice(PLANS)
            self.fold = d.choice(("fewer", "a", "b"))
            d.tag(f"plan: {self.plan}")
        d.tag("small chunks")
        self.chunk = d.choice(((5, 3), (16, 16), (37, 45), (64, 7)) if not d.small else ((7, 16), (16, 37)))
        self.bytes = d.choice((1, 300, 2048, 20_000))
        rows, columns = d.choice(((2, 9), (7, 5), (16, 64), (33, 17)))
        self.stream = retrieval_configs.StreamChunks(rows, columns, d.choice((columns, 2 * columns, 100 * columns)))

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.plan is not None:
                stack.enter_context(force_plan(self.plan, self.fold))
            if self.chunk is not None:
                stack.enter_context(choice.use(chunk=ChunkConfig(*self.chunk)))
                budget = {"cpu": self.bytes, "cuda": self.bytes}
                stack.enter_context(mock.patch.object(pairs, "CHUNK_BYTES", budget))
                stack.enter_context(mock.patch.object(retrieval_configs, "stream_chunks", lambda *shape: self.stream))
            yield
