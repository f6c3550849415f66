"""Cases of attention: weights shared or a head's own, masks, causal, broadcast leading dimensions, split heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import reference
from torch import Tensor, nn

import gssf_triton
from fuzz.draw import HALVES, Draw
from fuzz.judges import Case, Outputs, Tensors
from fuzz.similarities import choose_incoming, choose_mode, choose_needs


def _head_weights(d: Draw, H: int, G: int, B: int) -> Tensors:
    """Each weight of its own: absent, shared, or one a head."""
    parts = d.choice((("W_diag",), ("W_blocks",), ("W_diag", "W_blocks")))
    made: Tensors = {"W_diag": None, "W_blocks": None}
    for name in parts:
        kind = "diag" if name == "W_diag" else "blocks"
        if H and d.maybe(0.6, "a weight a head"):
            heads = [d.weights(kind, G, B, dtype=_weight_dtype(d))[name] for _ in range(H)]
            made[name] = d.lay(torch.stack([w for w in heads if w is not None]))
        else:
            made[name] = d.weights(kind, G, B)[name]
    return made


def _weight_dtype(d: Draw) -> torch.dtype:
    return torch.promote_types(d.dtype, torch.float32) if "float32 weights" in d.tags else d.dtype


def _mask(d: Draw, batch: tuple[int, ...], L: int, S: int) -> tuple[Tensor | None, bool]:
    kind = d.choice(("none", "none", "bool", "float", "causal"))
    d.tag(f"mask: {kind}")
    if kind == "none":
        return None, False
    if kind == "causal":
        return None, True
    shape = (*(1 if d.maybe(0.5) else n for n in batch), L, S)
    shape = shape[d.random.randint(0, len(batch)) :]
    if kind == "float":
        return d.lay(d.normal(*shape)), False
    keep = d.flags(*shape)
    keep[..., :1] = True  # a query that sees no key has no attention
    return d.lay(keep), False


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q (W ⊙ U) kᵀ · scale + mask) v with each head's dense metric."""
    shared_diag, shared_blocks = W_diag is None or W_diag.dim() == 1, W_blocks is None or W_blocks.dim() == 3
    if shared_diag and shared_blocks:
        metric = reference.dense_metric(W_diag, W_blocks)
    else:
        per_head = [
            reference.dense_metric(
                W_diag if W_diag is None or shared_diag else W_diag[h],
                W_blocks if W_blocks is None or shared_blocks else W_blocks[h],
            )
            for h in range(q.shape[-3])
        ]
        metric = torch.stack(per_head)
    if q.dtype in HALVES:
        # What torch's fused attention itself is off by: its backward takes a difference of rounded results.
        folded = q @ metric.to(q.dtype)
        return nn.functional.scaled_dot_product_attention(
            folded, k, v, attn_mask=mask, is_causal=is_causal, scale=scale
        )
    scores = q @ metric @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def attention(d: Draw) -> Case:
    G, B = d.channels(64)
    L, S, E = d.size(40), d.size(40, empty=0.0), d.choice((1, 3, 8, 24, G * B))
    H = d.choice((0, 1, 2, 3))
    batch = (*d.choice(((), (2,), (3,))), H) if H else ()
    if batch and d.maybe(0.2, "broadcast"):
        sides = [tuple(1 if d.maybe(0.3) and i < len(batch) - 1 else n for i, n in enumerate(batch)) for _ in range(3)]
    else:
        sides = [batch] * 3
    q, k, v = (
        d.rows(*side, n, channels, scale=1.0)
        for side, n, channels in zip(sides, (L, S, S), (G * B, G * B, E), strict=True)
    )
    if sides[0] == sides[1] and L == S and d.maybe(0.2, "a is b"):
        k = q
    tensors: Tensors = {"q": q, "k": k, "v": v, **_head_weights(d, H, G, B)}
    full = tuple(torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v))))
    mask, is_causal = _mask(d, full, L, S)
    scale = d.choice((None, None, 0.7, 0.0))
    mode = choose_mode(d)
    dtype = d.autocast if mode == "autocast" and d.dtype != torch.float64 else d.dtype

    def ours(given: Tensors) -> Outputs:
        options: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal, "scale": scale, "backend": d.asked}
        return (gssf_triton.attention(**given, **options),)  # type: ignore[arg-type]

    def exact(given: Tensors) -> Outputs:
        known = None if mask is None else mask.cpu() if mask.dtype == torch.bool else mask.cpu().to(dtype).double()
        return (oracle(**given, mask=known, is_causal=is_causal, scale=scale),)  # type: ignore[arg-type]

    return Case(
        function="attention", backend=d.backend, tags=d.tags, tensors=tensors, call=ours, oracle=exact,
        out_dtypes=(dtype,), needs=choose_needs(d, tensors), mode=mode, cast=frozenset("kv"), autocast=d.autocast,
        fixed={"mask": mask},
        incoming=choose_incoming(d, [(*full, L, E)], [dtype]), repeat=d.maybe(0.1, "repeated"),
    )  # fmt: skip


FAMILY: dict[str, Callable[[Draw], Case]] = {"attention": attention}
