"""GSSF attention in Hugging Face transformers, through its attention interface and its mask interface.

Both are needed: an attention registered without a mask function gets no masks, not even for padding. The library's own
`sdpa` computes scores, masks, caches and grouped keys, from T(q).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gssf_triton import checks
from gssf_triton.attention.heads import HeadMetric, complete_state_dict

#: The attention's name, for `attn_implementation`; also the name of the metric in each attention layer.
NAME = "gssf"

#: The config's entry that says which layers have a metric and of what form; `save_pretrained` writes it to config.json.
#: The configs of a model's parts (CLIP's vision model) have one for their own layers.
RECORD = "gssf_metric"

_Model = TypeVar("_Model", bound=PreTrainedModel)


class _Written(dict[str, Any]):
    """A record written by this process. A config read from a file has a plain dict."""


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
    """(H, D) of every layer that attends through the interface, found by one forward pass."""
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


def _metrics(model: nn.Module) -> dict[str, HeadMetric]:
    """The metrics by their layers' names."""
    return {
        name.removesuffix(NAME).removesuffix("."): module
        for name, module in model.named_modules()
        if isinstance(module, HeadMetric)
    }


def _attach(model: PreTrainedModel, name: str, metric: HeadMetric) -> None:
    """Make the metric a layer's submodule. State dicts of plain attention still load: see `complete_state_dict`."""
    owner = name
    while owner and next(model.get_submodule(owner).parameters(), None) is None:
        owner = owner.rpartition(".")[0]  # the module around the layer holds its weights
    model.get_submodule(name).add_module(NAME, metric)
    model.get_submodule(owner).register_load_state_dict_pre_hook(complete_state_dict)


def _place(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """The device and the dtype of a layer."""
    weight = next(model.get_submodule(name).parameters(), next(model.parameters()))
    return {"device": weight.device, "dtype": weight.dtype}


def _parts(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost model of each config, by name, the whole one first. A config's record names layers below it."""
    parts: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and all(module.config is not part.config for part in parts.values()):
            parts[name] = module
    return parts


def _write_record(model: PreTrainedModel) -> None:
    for part in _parts(model).values():
        record = _Written()
        for name, metric in _metrics(part).items():
            diag, blocks = metric.W_diag, metric.W_blocks
            weight = blocks.flatten(1, 2) if blocks is not None else diag
            assert weight is not None
            size = None if blocks is None else blocks.shape[-1]
            record[name] = [*weight.shape[:2], size, diag is not None, blocks is not None]
        if record:
            setattr(part.config, RECORD, record)


def _read_record(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The records of a model's config or its parts' configs, by part: layers' names in this model, and their forms.

    Layers that the model lacks (another part's, those beyond a smaller `num_hidden_layers`) are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for start, part in _parts(model).items():
        if any(not outer or start.startswith(f"{outer}.") for outer in found):
            continue
        names, base = dict(part.named_modules()), f"{part.base_model_prefix}."
        record = {}
        for name, form in (getattr(part.config, RECORD, None) or {}).items():
            # With or without a head around the base model.
            for own in (name, name.removeprefix(base), f"{base}{name}"):
                if own in names:
                    record[f"{start}.{own}" if start else own] = form
                    break
        if record:
            found[start] = record
    return found


def from_pretrained(model_class: type[_Model], folder: str | Path, *args: Any, **kwargs: Any) -> _Model:
    """Load a model that was saved after `add_metric`, with its trained metric.

    The library's own `model_class.from_pretrained` leaves the metric out and lists its weights as unexpected.
    `add_metric` can still bring it back, by loading a local folder once more. A part of a saved model (CLIP's vision
    model) loads with its metric too.

    Args:
        model_class: The model's class; an Auto class names it as `architectures` in the folder's config.json.
        folder: The folder that `save_pretrained` wrote, or the name of a repository, and further arguments, as there.

    Returns:
        The model, in evaluation mode as there.

    Raises:
        TypeError: a class that is not a `transformers.PreTrainedModel`.
        ValueError: a folder of a model without a metric.

    Warns:
        UserWarning: a config that names a metric whose weights are not there: it is the identity.

    Example:
        >>> from gssf_triton.integrations.transformers import from_pretrained
        >>> # add_metric(model); train it; model.save_pretrained("folder")
        >>> # model = from_pretrained(BertModel, "folder")
    """
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        came = f"{type(model_class).__name__} {model_class!r}"
        raise TypeError(f"model_class must be a transformers.PreTrainedModel class, got {came}")
    checks.check_path("folder", folder)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(built, self).__init__(config, *args, **kwargs)
        found = _read_record(self)
        if not found:
            kind = model_class.__name__
            raise ValueError(
                f"folder must hold a {kind} whose layers were saved with a metric, got {str(folder)!r}: load it with "
                f"{kind}.from_pretrained and call add_metric"
            )
        for record in found.values():
            for name, (heads, channels, *form) in record.items():
                _attach(self, name, HeadMetric(heads, channels, *form, **_place(self, name)))

    # The library looks up how to read a model's weights by the class's name and module.
    built: Any = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = built.from_pretrained(folder, *args, output_loading_info=True, **kwargs)
    model.__class__ = model_class
    lost = []
    for name, metric in _metrics(model).items():
        if any(key.startswith(f"{name}.{NAME}.") for key in info["missing_keys"]):
            metric.reset_metric()  # the library leaves missing weights uninitialised
            lost.append(name)
    if lost:
        warnings.warn(
            f"{str(folder)!r} holds no weights of a metric for {', '.join(lost)}, though its config names one: it is "
            "the identity there",
            stacklevel=2,
        )
    for start in _read_record(model):
        part = model.get_submodule(start)
        _write_record(part)
        _use(part)
    return (model, info) if wants_info else model  # type: ignore[return-value]


def _use(model: PreTrainedModel) -> None:
    AttentionInterface.register(NAME, gssf_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _records(config: PreTrainedConfig) -> list[Any]:
    """The record of a config, and those of the configs in it."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return [getattr(config, RECORD, None), *[_records(one) for one in inner if isinstance(one, PreTrainedConfig)]]


def _saved_metrics(model: PreTrainedModel) -> dict[str, HeadMetric]:
    """The metric of the folder that a model was loaded from, where it was saved with one."""
    in_memory = (isinstance(getattr(part.config, RECORD, _Written()), _Written) for part in _parts(model).values())
    if all(in_memory) or not _read_record(model):
        return {}
    folder, kind = model.config.name_or_path, type(model)
    where = repr(folder) if folder else f"this {kind.__name__} or a part of it"
    local = folder and Path(folder, "config.json").is_file()
    there = type(model.config).from_pretrained(folder) if local else None
    if there is not None and _records(there) == _records(model.config):
        try:
            saved = from_pretrained(kind, folder, config=model.config)
        except OSError:  # other file names: the model was loaded with variant=…
            saved = None
        if saved is not None:
            if not _same_weights(saved, model):
                warnings.warn(
                    f"the metric is that of {where}, whose other weights are not this model's: were they trained "
                    "since, or loaded from a subfolder, a revision? "
                    "gssf_triton.integrations.transformers.from_pretrained takes those arguments",
                    stacklevel=3,
                )
            return _metrics(saved)
    warnings.warn(
        f"{where} was saved with a metric, which the library's from_pretrained leaves out: here it is the identity. "
        "gssf_triton.integrations.transformers.from_pretrained loads it, given the same arguments; of a part, load the "
        "whole model with it",
        stacklevel=3,
    )
    return {}


def _same_weights(saved: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether the layers that have a metric are those of the saved model."""
    for name in _metrics(saved):
        ours = dict(model.get_submodule(name).named_parameters())
        theirs = dict(saved.get_submodule(name).named_parameters())
        for key, x in ours.items():
            if not x.is_meta and (key not in theirs or not torch.equal(theirs[key].to(x), x)):
                return False
    return True


def add_metric(
    model: PreTrainedModel,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    block_size: int | None = None,
    diag: bool = True,
    blocks: bool = True,
) -> dict[str, HeadMetric]:
    """Let every attention layer of a model score with GSSF, one metric a head. Nothing changes until it is trained.

    One forward pass finds the layers and their heads. The metrics are the layers' submodules `gssf`: in `parameters()`,
    in `state_dict()` and in what `save_pretrained` writes. `from_pretrained` of this module loads such a folder. If the
    library's own `from_pretrained` loaded the model from one, without the metric, this call brings the trained metric
    back from a local folder; where it cannot (a repository, a subfolder, a part of a loaded model), it warns.
    To load a state dict, build the model, call this, then `load_state_dict`. A layer (the module around the metric:
    BERT's `attention.self` with its query, key and value) whose plain weights are all in the state dict, without a
    metric, gets the identity; a state dict with only some of them (an adapter's) leaves the metric as it is.

    Args:
        model: Any model that attends through the library's attention interface.
        example_inputs: What `model(**example_inputs)` takes; its `dummy_inputs`, which fit text models, where None.
        block_size: Size B of the metrics' blocks, a divisor of a head's channels; None takes the largest up to 32.
        diag: Learn the diagonal term.
        blocks: Learn the block term.

    Returns:
        The metrics by their layers' names.

    Raises:
        ValueError: a model without such layers, or one that has the metric already, or options that are not those of
            the metric that was saved with it.

    Warns:
        UserWarning: a model that was saved with a metric, which is the identity here, or is of other weights.

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
    checks.check_kind("model", model, PreTrainedModel, "a transformers.PreTrainedModel")
    if example_inputs is not None:
        checks.check_kind("example_inputs", example_inputs, Mapping, "a mapping of names to inputs")
    checks.check_terms(diag, blocks)
    if block_size is not None:
        checks.check_count("block_size", block_size, 1)
    if any(isinstance(module, HeadMetric) for module in model.modules()):
        raise ValueError(f"model must be one without a metric, got a {type(model).__name__} that has one already")
    metrics = _saved_metrics(model)
    for name, metric in metrics.items():
        size = None if metric.W_blocks is None else metric.W_blocks.shape[-1]
        saved = (size, metric.W_diag is not None, size is not None)
        if (block_size, diag, blocks) not in ((None, True, True), (None, *saved[1:]), saved):
            raise ValueError(
                f"block_size, diag, blocks must be {saved}, as {model.config.name_or_path!r} was saved, or left out, "
                f"got {(block_size, diag, blocks)}"
            )
        metric.to(**_place(model, name))
    before = model.config._attn_implementation
    _use(model)
    try:
        if not (metrics and getattr(model.config, RECORD, None)):  # no metric yet, or only a part's
            if example_inputs is None:
                example_inputs = {name: x.to(model.device) for name, x in model.dummy_inputs.items()}
            sizes = _head_sizes(model, example_inputs)
            if not sizes:
                raise ValueError(
                    f"model must attend through the library's interface, got a {type(model).__name__} that does not"
                )
            for name, layer in model.named_modules():
                if layer in sizes and name not in metrics:
                    metrics[name] = HeadMetric(*sizes[layer], block_size, diag, blocks, **_place(model, name))
    except BaseException:
        model.set_attn_implementation(before)
        raise
    for name, metric in metrics.items():
        _attach(model, name, metric)
    _write_record(model)
    return metrics
