"""Masks of attention: the shapes that PyTorch documents are right, every other gets an error that names the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gssf_triton
from gssf_triton.nn import GSSFAttention

N, L, S, E, H = 3, 4, 5, 16, 2


def mask(shape: tuple[int, ...], dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(batched: bool, **masks: Tensor) -> Any:
    lead = (N,) if batched else ()
    return GSSFAttention(E, H, batch_first=True)(torch.randn(*lead, L, E), *[torch.randn(*lead, S, E)] * 2, **masks)


PADDING = [(1, S), (N, 1), (1, 1), (S,), (), (S, N), (N, S, 1), (N, 1, 1, S), (N, L)]
ALONE = [(1, S), (1,), (), (L,), (N, S), (S, 1)]
PAIRS = [(1, S), (L, 1), (S,), (), (S, L), (N, L, S), (1, L, S), (H, L, S), (N, H, L, S)]


@pytest.mark.parametrize("shape", PADDING, ids=str)
def test_padding_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"key_padding_mask must have shape \({N}, {S}\), got"):
        attend(True, key_padding_mask=mask(shape))


@pytest.mark.parametrize("shape", ALONE, ids=str)
def test_padding_of_another_shape_without_a_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"key_padding_mask must have shape \({S},\), got"):
        attend(False, key_padding_mask=mask(shape))


@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_pairs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"attn_mask must have shape \({L}, {S}\) or \({N * H}, {L}, {S}\), got"):
        attend(True, attn_mask=mask(shape))


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64], ids=str)
def test_masks_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{name} must be bool, float16"):
        attend(True, **{name: mask((N, S) if name == "key_padding_mask" else (L, S), dtype)})
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        attend(True, **{name: [[True] * S] * N})


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("batched", [True, False])
def test_masks_that_multihead_attention_documents(batched: bool, floating: bool) -> None:
    """The same numbers as nn.MultiheadAttention, a shape at a time; key 0 always takes part."""
    plain = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    ours = GSSFAttention(E, H, batch_first=True, dtype=torch.float64)
    ours.load_state_dict(plain.state_dict())
    lead = (N,) if batched else ()
    q, k = torch.randn(*lead, L, E, dtype=torch.float64), torch.randn(*lead, S, E, dtype=torch.float64)
    heads = N * H if batched else H
    for name, shape in (("key_padding_mask", (*lead, S)), ("attn_mask", (L, S)), ("attn_mask", (heads, L, S))):
        out = torch.rand(shape) < 0.5
        out[..., 0] = False
        given = torch.zeros(shape, dtype=torch.float64).masked_fill(out, -torch.inf) if floating else out
        for need_weights in (True, False):
            found = ours(q, k, k, need_weights=need_weights, **{name: given})[0]
            torch.testing.assert_close(found, plain(q, k, k, need_weights=need_weights, **{name: given})[0])


@pytest.mark.parametrize("shape", [(), (S,), (1, S), (L, 1), (L, S), (H, 1, 1), (N, 1, 1, S), (N, H, L, S)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_attention_takes_what_broadcasts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k = torch.randn(N, H, L, 8, dtype=torch.float64), torch.randn(N, H, S, 8, dtype=torch.float64)
    W_diag = torch.randn(8, dtype=torch.float64)
    given = torch.randn(shape, dtype=torch.float64)
    if dtype == torch.bool:
        given = torch.atleast_1d(torch.rand(shape) < 0.7)
        given[..., 0] = True
        given = given.reshape(shape)
    scores = (q * W_diag) @ k.mT / 8**0.5
    scores = scores.masked_fill(~given, -torch.inf) if dtype == torch.bool else scores + given
    found = gssf_triton.attention(q, k, k, W_diag, attn_mask=given)
    torch.testing.assert_close(found, scores.softmax(-1) @ k)


@pytest.mark.parametrize("shape", [(S, L), (2, S), (N, L, S), (1, N, H, L, S), (H, N, L, S)], ids=str)
def test_attention_refuses_what_does_not(shape: tuple[int, ...]) -> None:
    q, k = torch.randn(N, H, L, 8), torch.randn(N, H, S, 8)
    with pytest.raises(ValueError, match=rf"attn_mask must broadcast to \({N}, {H}, {L}, {S}\), got"):
        gssf_triton.attention(q, k, k, torch.ones(8), attn_mask=mask(shape))
