"""GSSF attention in small random models of transformers: unchanged at the start, masked, trained, generating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from reference import assert_close, tolerance
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from gssf_triton.heads import HeadMetric
from gssf_triton.integrations import transformers as integration
from gssf_triton.integrations.transformers import add_metric

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 30, "max_position_embeddings": 16, **SMALL}
VISION = {"image_size": 16, "patch_size": 8, **SMALL}


def bert() -> BertModel:
    return BertModel(BertConfig(**TEXT))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2))


def vit() -> ViTModel:
    return ViTModel(ViTConfig(**VISION))


def clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config={**TEXT, "eos_token_id": 29}, vision_config=VISION, projection_dim=16))


TOKENS = torch.tensor([[3, 5, 7, 9, 11, 29], [4, 6, 8, 29, 0, 0]])
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).sin().view(2, 3, 16, 16)

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Tensor], int]] = {
    "bert": (bert, {"input_ids": TOKENS, "attention_mask": PADDING}, 2),
    "llama-grouped": (llama, {"input_ids": TOKENS, "attention_mask": PADDING}, 2),
    "vit": (vit, {"pixel_values": PIXELS}, 2),
    "clip": (clip, {"input_ids": TOKENS, "attention_mask": PADDING, "pixel_values": PIXELS}, 4),
}


def made(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def randomise(metrics: dict[str, HeadMetric]) -> None:
    with torch.no_grad():
        for metric in metrics.values():
            metric.W_diag.normal_()
            metric.W_blocks.normal_(std=0.3)


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's answer at the tokens that are there."""
    with torch.no_grad():
        found = model(**inputs)
    if "logits_per_image" in found:
        return found.logits_per_image
    out = found.logits if "logits" in found else found.last_hidden_state
    return out if "attention_mask" not in inputs else out[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", MODELS)
def test_unchanged_until_trained_then_changed(name: str) -> None:
    make, inputs, layers = MODELS[name]
    model = made(make)
    expected = outputs(model, inputs)
    metrics = add_metric(model, inputs)
    assert len(metrics) == layers and all(metric.W_diag.shape == (4, 8) for metric in metrics.values())
    assert_close(outputs(model, inputs), expected, tolerance(torch.float64))
    randomise(metrics)
    changed = outputs(model, inputs)
    assert not torch.allclose(changed, expected, rtol=1e-3)
    model.train()(**inputs)
    assert model.training


def exact_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Scores written out from the dense metrics, masks from the library's eager interface."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    pairs = zip(module.gssf.W_diag, module.gssf.W_blocks, strict=True)
    metrics = torch.stack([reference.dense_metric(*pair) for pair in pairs])
    S = torch.einsum("nhim,hmd,nhjd->nhij", query, metrics, key) * kwargs["scaling"]
    if attention_mask is not None:
        S = S + attention_mask
    return (S.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("name", MODELS)
def test_trained_metric_under_the_models_masks(name: str) -> None:
    """Padding and causality reach the attention: the same as scores written out under the eager attention's masks."""
    make, inputs, _ = MODELS[name]
    model = made(make)
    randomise(add_metric(model, inputs))
    found = outputs(model, inputs)
    integration.AttentionInterface.register("exact", exact_attention)
    integration.AttentionMaskInterface.register("exact", integration.AttentionMaskInterface()["eager"])
    model.set_attn_implementation("exact")
    assert_close(found, outputs(model, inputs), tolerance(torch.float64))


@pytest.mark.parametrize("name", ["bert", "llama-grouped"])
def test_padding_has_no_say(name: str) -> None:
    make, inputs, _ = MODELS[name]
    model = made(make)
    randomise(add_metric(model))  # dummy_inputs find a text model's layers
    other = inputs | {"input_ids": torch.where(PADDING.bool(), TOKENS, 13)}
    assert_close(outputs(model, inputs), outputs(model, other), tolerance(torch.float64))


def test_generation_with_a_cache() -> None:
    model = made(llama)
    randomise(add_metric(model))
    prompt, options = TOKENS[:1, :4], {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def metrics_of(model: PreTrainedModel) -> list[HeadMetric]:
    return [module for module in model.modules() if isinstance(module, HeadMetric)]


def test_learns_and_loads() -> None:
    model = made(bert)
    metrics = add_metric(model, block_size=4)
    inputs = MODELS["bert"][1]
    model(**inputs).last_hidden_state.square().sum().backward()
    for metric in metrics.values():
        assert metric.W_blocks.shape == (4, 2, 4, 4) and metric.W_blocks.grad.any() and metric.W_diag.grad.any()
    randomise(metrics)
    other = made(bert)
    add_metric(other, block_size=4)
    plain = {name: x for name, x in model.state_dict().items() if ".gssf." not in name}
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))
    other.load_state_dict(plain)  # a plain checkpoint: strictly, and back to the identity
    assert all(torch.equal(metric.W_diag, torch.ones_like(metric.W_diag)) for metric in metrics_of(other))


def test_mistakes() -> None:
    model = made(bert)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="block_size must divide the 8 channels of a head, got 5"):
        add_metric(model, block_size=5)
    assert model.config._attn_implementation == "sdpa" and not metrics_of(model)
    add_metric(model)
    with pytest.raises(ValueError, match="BertModel that has one already"):
        add_metric(model)
    with pytest.raises(RuntimeError, match=r"BertSelfAttention has no metric: call .*add_metric\(model\)"):
        outputs(BertModel(BertConfig(**TEXT, attn_implementation="gssf")), MODELS["bert"][1])


@pytest.mark.skipif(not T5Model._can_set_attn_implementation(), reason="T5 attends in its own way in this release")
def test_position_biases_are_kept() -> None:
    model = made(lambda: T5Model(T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)))
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    before = outputs(model, inputs)
    metrics = add_metric(model, inputs)
    assert_close(outputs(model, inputs), before, tolerance(torch.float64))
    assert len(metrics) == 3  # encoder, decoder, and from one to the other
