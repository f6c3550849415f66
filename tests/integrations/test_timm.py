"""GSSF attention as the attn_layer of timm's vision transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import reference
from support.reference import assert_close, features, tolerance
from timm.layers import set_fused_attn
from timm.models import create_feature_extractor
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

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


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
def test_a_partial_state_dict_leaves_the_metric_alone(qk_norm: bool) -> None:
    ours = transformer(GSSFAttention, qk_norm=qk_norm)
    randomise(ours)
    before = {name: x.clone() for name, x in ours.state_dict().items() if "W_" in name}
    whole = {**transformer(qk_norm=qk_norm).state_dict()}
    for wanted in ("nothing", "head.", "norm.weight", "proj.bias"):
        given = {name: x for name, x in whole.items() if wanted in name}
        found = ours.load_state_dict(given, strict=False)
        assert set(before) <= set(found.missing_keys) and not found.unexpected_keys
        assert all(torch.equal(ours.state_dict()[name], x) for name, x in before.items())


class Kept(torch.nn.Module):
    """As PEFT wraps a module that an adapter holds: the first one, and the copy that is trained."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = torch.nn.ModuleDict({"default": copy.deepcopy(module)})

    def forward(self, q: Tensor) -> Tensor:
        return self.modules_to_save["default"](q)


def parametrized(module: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.utils.parametrize.register_parametrization(module, "W_diag", torch.nn.Identity())


@pytest.mark.parametrize("wrap", [Kept, torch.compile, parametrized], ids=["adapter", "compiled", "parametrized"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
def test_a_wrapped_metric_loads_what_it_saved(qk_norm: bool, wrap: Any) -> None:
    def wrapped() -> VisionTransformer:
        model = transformer(GSSFAttention, qk_norm=qk_norm)
        for block in model.blocks:
            block.attn.q_norm = wrap(block.attn.q_norm)
        return model

    ours, other = wrapped(), wrapped()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    whole = {name: x.clone() for name, x in ours.state_dict().items()}
    adapter = {name: x for name, x in whole.items() if "q_norm" in name and "original_module" not in name}
    assert any("W_diag" in name for name in adapter)
    found = other.load_state_dict(adapter, strict=False)
    assert not found.unexpected_keys and not set(adapter) & set(found.missing_keys)
    assert all(torch.equal(other.state_dict()[name], x) for name, x in adapter.items())
    other.load_state_dict(whole)
    assert all(torch.equal(other.state_dict()[name], x) for name, x in whole.items())


def test_a_part_that_holds_a_layer_whole_resets_that_layer_alone() -> None:
    ours, plain = transformer(GSSFAttention, qk_norm=True), transformer(qk_norm=True).state_dict()
    randomise(ours)
    kept = ours.blocks[1].attn.q_norm.W_diag.clone()
    ours.load_state_dict({name: x for name, x in plain.items() if name.startswith("blocks.0.attn.")}, strict=False)
    assert (ours.blocks[0].attn.q_norm.W_diag == 1).all() and torch.equal(ours.blocks[1].attn.q_norm.W_diag, kept)


def test_from_the_meta_device_a_plain_models_weights_give_its_output() -> None:
    plain, ours = transformer(qk_norm=True), transformer(GSSFAttention, qk_norm=True).float().to("meta")
    ours.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_close(ours(x), plain(x), tolerance(torch.float64))


def test_feature_extractors_see_the_metric_as_one_step() -> None:
    model = transformer(GSSFAttention, qk_norm=True)
    randomise(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = create_feature_extractor(model, {"blocks.0.attn.q_norm": "queries", "blocks.0": "tokens", "head": "out"})(x)
    assert torch.equal(found["out"], model(x)) and torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    attn, seen = model.blocks[0].attn, []
    handle = attn.q_norm.register_forward_hook(lambda module, inputs, out: seen.append(out))
    tokens = model.get_intermediate_layers(x, n=[0], return_prefix_tokens=True)[0]
    handle.remove()
    assert torch.equal(found["queries"], seen[0])
    assert torch.equal(found["tokens"], torch.cat(tokens[::-1], 1))


def test_trains_with_its_options() -> None:
    model = transformer(GSSFAttention).train()
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).square().sum().backward()
    for block in model.blocks:
        assert block.attn.q_norm.W_diag.grad.any() and block.attn.q_norm.W_blocks.grad.any()
    only_diag = GSSFAttention(DIM, HEADS, blocks=False)
    assert only_diag.q_norm.W_blocks is None and only_diag.q_norm.W_diag.shape == (HEADS, 16)
    with pytest.raises(ValueError, match="block_size"):
        GSSFAttention(DIM, HEADS, block_size=5)
