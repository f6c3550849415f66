"""GSSF attention in small random models of transformers: unchanged at the start, masked, trained, generating."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.reference import assert_close, tolerance
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from gssf_triton.attention.heads import HeadMetric
from gssf_triton.integrations import transformers as integration
from gssf_triton.integrations.transformers import add_metric, from_pretrained

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
    text = {**TEXT, "eos_token_id": 29, "projection_dim": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_partial_state_dict_leaves_the_metric_alone(copied: Callable[[Any], Any]) -> None:
    """An adapter's, a head's; a whole plain one sets the identity, in copies too."""
    model = made(bert)
    randomise(add_metric(model))
    inputs, expected = MODELS["bert"][1], outputs(model, MODELS["bert"][1])
    other = copied(model)
    plain = {name: x for name, x in other.state_dict().items() if ".gssf." not in name}
    layer = {name: x for name, x in plain.items() if name.startswith("encoder.layer.0.attention.self.query")}
    for partial in ({}, layer, {"pooler.dense.bias": plain["pooler.dense.bias"]}):
        missing = other.load_state_dict(partial, strict=False).missing_keys
        assert len([name for name in missing if ".gssf.W_" in name]) == 4
        assert torch.equal(outputs(other, inputs), expected)
    other.load_state_dict(plain)
    assert not torch.allclose(outputs(other, inputs), expected)
    assert all(torch.equal(metric.W_diag, torch.ones(4, 8)) for metric in metrics_of(other))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_with_its_metric(name: str, tmp_path: Path) -> None:
    """By our from_pretrained, and by the library's own with add_metric after it; sharded."""
    make, inputs, _ = MODELS[name]
    model = made(make)
    metrics = add_metric(model, inputs, block_size=4, diag=False)
    with torch.no_grad():
        for metric in metrics.values():
            metric.W_blocks.normal_()
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path, max_shard_size="30kB")
    loaded = from_pretrained(type(model), tmp_path, dtype=torch.float64)
    plain = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert not metrics_of(plain) and not torch.allclose(outputs(plain, inputs), expected)
    assert add_metric(plain).keys() == metrics.keys()
    for other in (loaded, plain):
        assert type(other) is type(model) and not other.training
        assert_close(outputs(other, inputs), expected, tolerance(torch.float64))
        for name, x in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], x)
    loaded.train()(**inputs)[0].sum().backward()
    assert all(metric.W_blocks.grad is not None for metric in metrics_of(loaded))
    with pytest.raises(ValueError, match=r"block_size, diag, blocks must be \(4, False, True\), as .* got \(2, True"):
        add_metric(type(model).from_pretrained(tmp_path), inputs, block_size=2)


def test_a_saved_metric_fits_the_model_with_a_head_and_without(tmp_path: Path) -> None:
    model = made(lambda: BertForMaskedLM(BertConfig(**TEXT)))
    randomise(add_metric(model))
    model.save_pretrained(tmp_path / "head")
    inputs = MODELS["bert"][1]
    expected = outputs(model.bert, inputs)
    base = from_pretrained(BertModel, tmp_path / "head", dtype=torch.float64)
    assert torch.equal(outputs(base, inputs), expected)
    base.save_pretrained(tmp_path / "base")
    again, info = from_pretrained(
        BertForMaskedLM, tmp_path / "base", dtype=torch.float64, output_loading_info=True
    )  # a head is made anew, the metric is not
    assert torch.equal(outputs(again.bert, inputs), expected)
    assert not any("gssf" in name for name in (*info["missing_keys"], *info["unexpected_keys"]))


def test_a_folder_without_a_metric(tmp_path: Path) -> None:
    plain = made(bert)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"must hold a BertModel whose layers were saved with a metric, got '.*plain'"):
        from_pretrained(BertModel, tmp_path / "plain")
    with pytest.raises(TypeError, match=r"model_class must be a transformers\.PreTrainedModel class, got .*AutoModel"):
        from_pretrained(AutoModel, tmp_path / "plain")
    model = BertModel.from_pretrained(tmp_path / "plain")
    randomise(add_metric(model))
    other = BertModel(model.config)  # of the same config, but nothing was saved with a metric
    assert all(torch.equal(metric.W_diag, torch.ones(4, 8)) for metric in add_metric(other).values())
    # The config knows of a metric, its weights are not there: the identity, never what memory held.
    model.save_pretrained(tmp_path / "lost", state_dict=plain.state_dict())
    with pytest.warns(UserWarning, match=r"lost' holds no weights of a metric for encoder\.layer\.0\.att"):
        lost = from_pretrained(BertModel, tmp_path / "lost")
    assert all(torch.equal(m.W_diag, torch.ones(4, 8)) and not m.W_blocks.any() for m in metrics_of(lost))


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    model = made(bert)
    randomise(add_metric(model))
    model.save_pretrained(tmp_path)
    plain = BertModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.warns(UserWarning, match=r"was saved with a metric.*gssf_triton\.integrations\.transformers\.from_pre"):
        add_metric(plain)


def test_parts_of_a_saved_model_keep_their_metric(tmp_path: Path) -> None:
    model, inputs = made(clip), MODELS["clip"][1]
    randomise(add_metric(model, inputs))
    model.save_pretrained(tmp_path)
    pixels, text = {"pixel_values": PIXELS}, {"input_ids": TOKENS, "attention_mask": PADDING}
    options = {"dtype": torch.float64}
    whole, vision = (cls.from_pretrained(tmp_path, **options) for cls in (CLIPModel, CLIPVisionModel))
    assert len(add_metric(vision)) == 2
    for one in (vision, from_pretrained(CLIPVisionModel, tmp_path, **options)):
        assert torch.equal(outputs(one, pixels), outputs(model.vision_model, pixels))
    reader = from_pretrained(CLIPTextModelWithProjection, tmp_path, **options)
    assert torch.equal(outputs(reader.text_model, text), outputs(model.text_model, text))
    with pytest.warns(
        UserWarning, match=r"this CLIPVisionModel or a part of it was saved with a metric.*load the whole model"
    ):
        add_metric(whole.vision_model, pixels)


def test_a_metric_in_a_part_alone_is_saved(tmp_path: Path) -> None:
    model, inputs = made(clip), MODELS["clip"][1]
    metrics = add_metric(model.vision_model, {"pixel_values": PIXELS})
    randomise(metrics)
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path / "first")
    loaded = from_pretrained(CLIPModel, tmp_path / "first", dtype=torch.float64)
    loaded.save_pretrained(tmp_path / "again")
    for one in (loaded, from_pretrained(CLIPModel, tmp_path / "again", dtype=torch.float64)):
        assert len(metrics_of(one)) == 2 and torch.equal(outputs(one, inputs), expected)
    plain = CLIPModel.from_pretrained(tmp_path / "first", dtype=torch.float64)
    found = add_metric(plain, inputs)  # the text model's starts as the identity
    assert len(found) == 4 and torch.allclose(outputs(plain, inputs), expected)
    for name, metric in metrics.items():
        assert torch.equal(found[f"vision_model.{name}"].W_diag, metric.W_diag)
    with pytest.raises(ValueError, match="hold a CLIPTextModelWithProjection whose layers were saved with a me"):
        from_pretrained(CLIPTextModelWithProjection, tmp_path / "first")


def test_other_ways_to_load_keep_the_metric_or_say_so(tmp_path: Path) -> None:
    model = made(bert)
    first, _ = add_metric(model).values()
    randomise({"first": first})
    for start in ("", "sub"):
        model.save_pretrained(tmp_path / start)
        torch.nn.init.constant_(first.W_diag, 3.0)  # another metric, of other weights, in the subfolder
        torch.nn.init.zeros_(model.encoder.layer[0].attention.self.query.weight)
    fewer = BertModel.from_pretrained(tmp_path, num_hidden_layers=1)
    add_metric(fewer)
    for one in (fewer, from_pretrained(BertModel, tmp_path, num_hidden_layers=1)):
        (metric,) = metrics_of(one)
        assert torch.equal(metric.W_blocks, first.W_blocks) and not (metric.W_diag == 3).any()
    with pytest.warns(UserWarning, match=r"whose other weights are not this model's.*a subfolder"):
        add_metric(BertModel.from_pretrained(tmp_path, subfolder="sub"))
    (tmp_path / "config.json").unlink()
    with pytest.warns(UserWarning, match=r"here it is the identity\..*given the same arguments"):
        add_metric(BertModel.from_pretrained(tmp_path, subfolder="sub"))
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    with pytest.warns(UserWarning, match="here it is the identity"):
        add_metric(BertModel.from_pretrained(tmp_path / "variant", variant="fp16"))
    assert (metrics_of(from_pretrained(BertModel, tmp_path, subfolder="sub"))[0].W_diag == 3).all()
    fresh = BertModel(from_pretrained(BertModel, tmp_path, subfolder="sub").config)  # its config, but nothing loaded
    assert all((metric.W_diag == 1).all() for metric in add_metric(fresh).values())


def test_a_plain_model_of_a_shared_config_is_said_to_have_no_metric(tmp_path: Path) -> None:
    config = BertConfig(**TEXT)
    plain, inputs = BertModel(config).eval(), MODELS["bert"][1]
    expected = outputs(plain, inputs)
    add_metric(BertModel(config))
    plain.save_pretrained(tmp_path)
    for load in (from_pretrained, lambda cls, folder: cls.from_pretrained(folder)):
        with pytest.warns(UserWarning, match="holds no weights of a metric for"):
            one = load(BertModel, tmp_path)
            if not metrics_of(one):
                add_metric(one)
        torch.testing.assert_close(outputs(one, inputs), expected)


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
