"""GSSF attention in Hugging Face transformers, through its attention interface and its mask interface.

Both are needed: an attention registered without a mask function is called without masks, padding included. Scores,
masks, caches and grouped keys stay the library's own `sdpa`; it is given T(q).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gssf_triton.heads import HeadMetric
from gssf_triton.options import check_count, check_terms

#: The attention's name, for `attn_implementation`; also the name of the metric in each attention layer.
NAME = "gssf"


def gssf_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The library's `sdpa` attention on T(query), (N, H, L, D), under the layer's own metric."""
    metric = getattr(module, NAME, None)
    if metric is None:
        raise RuntimeError(
            f"{type(module).__name__} has no metric: call gssf_triton.integrations.transformers.add_metric(model) "
            f"rather than asking for attn_implementation={NAME!r}"
        )
    return _sdpa(module, metric(query), key, value, attention_mask, **kwargs)


def _sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, *args, **kwargs)
    return result


def _head_sizes(model: PreTrainedModel, example_inputs: Mapping[str, Any]) -> dict[nn.Module, tuple[int, int]]:
    """(H, D) of every layer that attends through the interface, seen in one forward pass."""
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def look(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        sizes[module] = (query.shape[1], query.shape[-1])
        return _sdpa(module, query, *args, **kwargs)

    training = model.training
    AttentionInterface.register(NAME, look)
    try:
        with torch.no_grad():
            model.eval()(**example_inputs)
    finally:
        AttentionInterface.register(NAME, gssf_attention)
        model.train(training)
    return sizes


def add_metric(
    model: PreTrainedModel,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    block_size: int | None = None,
    diag: bool = True,
    blocks: bool = True,
) -> dict[str, HeadMetric]:
    """Let every attention layer of a model score with GSSF, a metric a head; nothing changes until it is trained.

    One forward pass finds the layers and their heads. The metrics are the layers' submodules `gssf`: in `parameters()`
    and `state_dict()`. To load a saved model, build it, call this, then `load_state_dict`.

    Args:
        model: Any model that attends through the library's attention interface.
        example_inputs: What `model(**example_inputs)` takes; its `dummy_inputs`, which fit text models, where None.
        block_size: Size B of the metrics' blocks, a divisor of a head's channels; None takes the largest up to 32.
        diag: Learn the diagonal term.
        blocks: Learn the block term.

    Returns:
        The metrics by their layers' names.

    Raises:
        ValueError: a model without such layers, or one that has the metric already.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from gssf_triton.integrations.transformers import add_metric
        >>> model = BertModel(BertConfig(
        ...     vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
        >>> for name, metric in add_metric(model).items():
        ...     print(name, tuple(metric.W_diag.shape))
        encoder.layer.0.attention.self (2, 16)
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    if example_inputs is not None and not isinstance(example_inputs, Mapping):
        raise TypeError(f"example_inputs must be a mapping of names to inputs, got {type(example_inputs).__name__}")
    check_terms(diag, blocks)
    if block_size is not None:
        check_count("block_size", block_size, 1)
    if any(isinstance(module, HeadMetric) for module in model.modules()):
        raise ValueError(f"model must be one without a metric, got a {type(model).__name__} that has one already")
    AttentionInterface.register(NAME, gssf_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if example_inputs is None:
        example_inputs = {name: x.to(model.device) for name, x in model.dummy_inputs.items()}
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        sizes = _head_sizes(model, example_inputs)
        if not sizes:
            raise ValueError(
                f"model must attend through the library's interface, got a {type(model).__name__} that does not"
            )
        metrics = {}
        for name, layer in model.named_modules():
            if layer in sizes:
                weight = next(layer.parameters(), next(model.parameters()))
                heads, channels = sizes[layer]
                options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
                metrics[name] = HeadMetric(heads, channels, block_size, diag, blocks, **options)
    except BaseException:
        model.set_attn_implementation(before)
        raise
    for name, metric in metrics.items():
        model.get_submodule(name).add_module(NAME, metric)
    return metrics
