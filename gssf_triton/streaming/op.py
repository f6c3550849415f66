"""The one `torch.library` operator of everything streamed, `gssf::stream`; the losses call it, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from gssf_triton.streaming.chunks import chunk_shape
from gssf_triton.streaming.driver import Engine, Operands, TorchEngine, stream
from gssf_triton.streaming.epilogues import EPILOGUES, state_dtype


def _engine(backend: str, t: Tensor, columns: int) -> Engine:
    engine: type[Engine] = TorchEngine
    if backend == "triton":
        from gssf_triton.kernels.stream import TritonEngine

        engine = TritonEngine
    entry_bytes = engine.ARRAYS * t.element_size()
    return engine(chunk_shape(t.shape[0], columns, t.shape[1], t.dtype, t.device, entry_bytes=entry_bytes))


@torch.library.custom_op(
    "gssf::stream",
    mutates_args=(),
    schema="(str epilogue, Tensor t, Tensor y, Tensor? teacher_t, Tensor? teacher_y, Tensor rows, Tensor columns, "
    "Tensor? row_ids, Tensor? column_ids, Tensor scalars, SymInt offset, bool wants_slope, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def stream_op(
    epilogue: str,
    t: Tensor,
    y: Tensor,
    teacher_t: Tensor | None,
    teacher_y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    scalars: Tensor,
    offset: int,
    wants_slope: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row state, column state, totals, slope @ y, slopeᵀ @ t); the last two are empty without `wants_slope`."""
    operands = Operands(t, y, teacher_t, teacher_y, rows, columns, row_ids, column_ids, scalars, offset)
    with torch.autocast(t.device.type, enabled=False):
        result = stream(_engine(backend, t, y.shape[0]), epilogue, operands, wants_slope)
    empty = (t.new_empty(0), t.new_empty(0))
    d_t, d_y = empty if result.d_t is None or result.d_y is None else (result.d_t, result.d_y)
    return result.row_state, result.column_state, result.totals, d_t, d_y


@stream_op.register_fake
def _(
    epilogue: str,
    t: Tensor,
    y: Tensor,
    teacher_t: Tensor | None,
    teacher_y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    scalars: Tensor,
    offset: int,
    wants_slope: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept, wide = EPILOGUES[epilogue], state_dtype(t.dtype)

    def state(outputs: int, length: int | torch.SymInt) -> Tensor:
        return t.new_empty((outputs, length), dtype=wide)

    d_t, d_y = ((t.new_empty(x.shape, dtype=wide) if wants_slope else t.new_empty(0)) for x in (t, y))
    return (
        state(len(kept.row_empty), t.shape[0]),
        state(len(kept.column_empty), y.shape[0]),
        t.new_empty(kept.totals, dtype=wide),
        d_t,
        d_y,
    )
