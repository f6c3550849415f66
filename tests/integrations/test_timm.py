"""GSSF attention as the attn_layer of timm's vision transformers."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from reference import assert_close, features, tolerance
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer

from gssf_triton.integrations.timm import GSSFAttention

DIM, HEADS = 48, 3


def transformer(attn_layer: Any = None, **options: Any) -> VisionTransformer:
    given = {} if attn_layer is None else {"attn_layer": attn_layer}
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=DIM, depth=2, num_heads=HEADS, num_classes=5, **given, **options
    )
    return model.double().eval()


def randomise(model: VisionTransformer) -> None:
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_norm.W_diag.normal_()
            block.attn.q_norm.W_blocks.normal_(std=0.3)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
def test_a_plain_models_weights_give_its_output(qk_norm: bool) -> None:
    plain, ours = transformer(qk_norm=qk_norm), transformer(GSSFAttention, qk_norm=qk_norm)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    randomise(ours)
    ours.load_state_dict(plain.state_dict())  # strictly; the metric goes back to the identity
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_close(ours(x), plain(x), tolerance(torch.float64))
    randomise(ours)
    again = transformer(GSSFAttention, qk_norm=qk_norm)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x)) and not torch.allclose(ours(x), plain(x))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written-out"])
@pytest.mark.parametrize("mask", ["none", "bool", "causal"])
def test_trained_metric(fused: bool, mask: str) -> None:
    set_fused_attn(fused)
    try:
        layer = GSSFAttention(DIM, HEADS, qkv_bias=True, block_size=8).double().eval()
    finally:
        set_fused_attn(True)
    with torch.no_grad():
        layer.q_norm.W_diag.normal_()
        layer.q_norm.W_blocks.normal_()
    x = features(2, 7, DIM, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
    metrics = [reference.dense_metric(*pair) for pair in zip(layer.q_norm.W_diag, layer.q_norm.W_blocks, strict=True)]
    S = torch.einsum("nhim,hmd,nhjd->nhij", q, torch.stack(metrics), k) / (DIM // HEADS) ** 0.5
    keep = torch.ones(7, 7, dtype=torch.bool)
    if mask == "bool":
        keep = torch.rand(7, 7) < 0.6
        keep[:, 0] = True
    options: dict[str, Any] = {"attn_mask": keep} if mask == "bool" else {}
    if mask == "causal":
        keep, options = keep.tril(), {"is_causal": True}
    expected = layer.proj((S.masked_fill(~keep, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert_close(layer(x, **options), expected, tolerance(torch.float64))


def test_trains_with_its_options() -> None:
    model = transformer(GSSFAttention).train()
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    for block in model.blocks:
        assert block.attn.q_norm.W_diag.grad.any() and block.attn.q_norm.W_blocks.grad.any()
    only_diag = GSSFAttention(DIM, HEADS, blocks=False)
    assert only_diag.q_norm.W_blocks is None and only_diag.q_norm.W_diag.shape == (HEADS, 16)
    with pytest.raises(ValueError, match="block_size"):
        GSSFAttention(DIM, HEADS, block_size=5)
