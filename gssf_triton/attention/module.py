"""`nn.MultiheadAttention` with GSSF similarities as its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from gssf_triton import checks
from gssf_triton.attention.functional import check_attention_mask, fold_heads, fold_queries
from gssf_triton.attention.heads import check_heads, complete_state_dict
from gssf_triton.backend import resolve_backend
from gssf_triton.metric import Metric
from gssf_triton.precision import full_precision
from gssf_triton.similarity.parameters import Learned, repr_of_weights, reset_metric
from gssf_triton.tracing import Leaf


def _split(x: Tensor, num_heads: int) -> Tensor:
    """(..., L, E) to (..., H, L, D), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def _project(inputs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None) -> Sequence[Tensor]:
    """Queries, keys and values of one input for all or of three, by one packed weight or by three."""
    if len(weights) == 1 == len(inputs):
        return F.linear(inputs[0], weights[0], bias).chunk(3, dim=-1)
    weights = weights[0].chunk(3) if len(weights) == 1 else weights
    inputs = inputs if len(inputs) == 3 else [inputs[0]] * 3
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, channels: tuple[int, ...], batch_first: bool) -> bool:
    """Whether the inputs have a batch dimension."""
    for name, x, wanted in zip(("query", "key", "value"), (query, key, value), channels, strict=True):
        checks.check_features(name, x, min_dim=1)
        if x.is_nested:
            raise ValueError(
                f"{name} must not be a nested tensor, which nn.TransformerEncoder makes of padded input: "
                "build it with enable_nested_tensor=False, or set its use_nested_tensor to False"
            )
        if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != wanted:
            form = "(N, L, E)" if batch_first else "(L, N, E)"
            like = "" if x is query else f", with as many dimensions as query {tuple(query.shape)}"
            raise ValueError(f"{name} must be {form} or (L, E) with E = {wanted}{like}, got {tuple(x.shape)}")
        checks.check_same_device("query", query, name, x)
    batch_dim = 0 if batch_first else 1
    names, shapes = ("query", "key", "value"), [checks.shape_of(x) for x in (query, key, value)]
    if query.dim() == 3 and not query.shape[batch_dim] == key.shape[batch_dim] == value.shape[batch_dim]:
        raise checks.differing(f"batch size in dimension {batch_dim}", names, shapes)
    if key.shape[:-1] != value.shape[:-1]:
        raise checks.differing("length", names[1:], shapes[1:])
    return query.dim() == 3


def _merge(attn_mask: Tensor | None, padding: Tensor | None, num_heads: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcasting to (N, H, L, S)."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, num_heads)))
    if padding is not None:
        masks.append(padding[..., None, None, :])
    added = [
        torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask.to(dtype)
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1] if added else None


class _Layer(NamedTuple):
    """What a layer brings to its inputs: projections, the heads' metric and how inputs are laid out."""

    weights: Sequence[Tensor]
    bias: Tensor | None
    W_diag: Tensor | None
    W_blocks: Tensor | None
    channels: tuple[int, ...]
    num_heads: int
    batch_first: bool
    dropout: float


@torch.fx.wrap
def attend_heads(
    layer: _Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """`GSSFAttention.forward` without `out_proj`: the heads' output, of query's shape, and the weights or None."""
    checks.check_flags(need_weights=need_weights, average_attn_weights=average_attn_weights, is_causal=is_causal)
    num_heads, dropout, metric = layer.num_heads, layer.dropout, Metric(layer.W_diag, layer.W_blocks)
    batched = _check_inputs(query, key, value, layer.channels, layer.batch_first)
    batch_dim = 0 if layer.batch_first or not batched else 1
    inputs = [query] if query is key and key is value else [query, key, value]
    inputs = [x.unsqueeze(0) if not batched else x.transpose(0, batch_dim) for x in inputs]
    N, L, S = inputs[0].shape[0], inputs[0].shape[1], inputs[-1].shape[1]
    padding_shape = (N, S) if batched else (S,)
    check_attention_mask("key_padding_mask", key_padding_mask, "query", query, [padding_shape])
    check_attention_mask("attn_mask", attn_mask, "query", query, [(L, S), (N * num_heads, L, S)])

    q, k, v = (_split(x, num_heads) for x in _project(inputs, layer.weights, layer.bias))
    q, k = fold_queries(q, k, metric, backend=resolve_backend("auto", q, layer.W_blocks))
    flag = is_causal and key_padding_mask is None and not need_weights
    if is_causal and not flag and attn_mask is None:
        attn_mask = torch.ones(L, S, dtype=torch.bool, device=query.device).triu(1)
    mask = None if flag else _merge(attn_mask, key_padding_mask, num_heads, q.dtype)
    attention = None
    if need_weights:
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        attention = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        heads = attention @ v
    else:
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=flag)
    if attention is not None and average_attn_weights:
        attention = attention.mean(1)
    heads = heads.transpose(-3, -2).flatten(-2)
    if not batched:
        return heads[0], None if attention is None else attention[0]
    return heads.transpose(0, batch_dim), attention


class GSSFAttention(Leaf, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with GSSF similarities as its scores: one metric a head, the identity at the start.

    A drop-in: the same arguments, parameters, names and, until the metric is trained, the same output.
    `load_state_dict` takes the state dict of an `nn.MultiheadAttention` and then sets the metric to the identity; one
    that holds only some of the layer's weights leaves the metric as it is. With `need_weights=False` the attention is
    PyTorch's scaled_dot_product_attention. `need_weights=True`, the default, also returns the weights and is slower.
    Not supported: `add_bias_kv`, `add_zero_attn` and nested tensors.

    Args:
        embed_dim: Channels of the model.
        num_heads: Heads H; divides `embed_dim`.
        dropout: Probability that an attention weight is dropped in training.
        bias: Biases in the projections.
        kdim: Channels of the keys; `embed_dim` where None.
        vdim: Channels of the values; `embed_dim` where None.
        batch_first: Inputs and output are (N, L, E) rather than (L, N, E).
        block_size: Size B of the metric's blocks, which must divide `embed_dim / num_heads`; None takes the largest
            divisor up to 32.
        diag: Learn the diagonal term.
        blocks: Learn the block term.
        device: Where the parameters are made.
        dtype: Their dtype.

    Attributes:
        W_diag: Parameter (H, D) with D = embed_dim / num_heads, or None.
        W_blocks: Parameter (H, D/B, B, B), or None.

    Raises:
        ValueError: sizes that do not divide, or neither term.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266); Vaswani et al., Attention Is All You Need, 2017.

    Example:
        >>> import torch
        >>> from gssf_triton.nn import GSSFAttention
        >>> plain = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> ours = GSSFAttention(64, 4, batch_first=True)
        >>> _ = ours.load_state_dict(plain.state_dict())
        >>> x = torch.randn(2, 10, 64)
        >>> torch.allclose(ours(x, x, x)[0], plain(x, x, x)[0], atol=1e-6)
        True
    """

    W_diag: nn.Parameter | None
    W_blocks: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        block_size: int | None = None,
        diag: bool = True,
        blocks: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_count("embed_dim", embed_dim, 1)
        checks.check_count("num_heads", num_heads, 1)
        for name, channels in (("kdim", kdim), ("vdim", vdim)):
            if channels is not None:
                checks.check_count(name, channels, 1)
        checks.check_probability("dropout", dropout)
        checks.check_flags(bias=bias, batch_first=batch_first)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}, got {num_heads}")
        learned = Learned(diag, blocks, block_size, device, dtype)
        check_heads(num_heads, embed_dim // num_heads, learned)
        layout = {"kdim": kdim, "vdim": vdim, "batch_first": batch_first}
        super().__init__(embed_dim, num_heads, dropout, bias, **layout, device=device, dtype=dtype)
        self._packed_projection = self._qkv_same_embed_dim
        # nn.TransformerEncoder's fast path would compute plain attention and never call forward. It is not taken for
        # modules whose projections are not packed.
        self._qkv_same_embed_dim = False
        learned.add_to(self, self.head_dim, num_heads)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, with the metric the identity; also initialises what was made on the meta device."""
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Called by the constructor of `nn.MultiheadAttention` before the metric exists."""
        said, self._qkv_same_embed_dim = self._qkv_same_embed_dim, self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = said
        if "W_diag" in self._parameters:
            reset_metric(self)

    def reset_metric(self) -> None:
        """Back to plain attention: the metric is the identity again."""
        reset_metric(self)

    @torch.no_grad()
    def merged(self) -> nn.MultiheadAttention:
        """A plain `nn.MultiheadAttention` of the same output, for serving: T is folded into the query projection."""
        weight, biased = self.out_proj.weight, self.in_proj_bias is not None
        layout = {"kdim": self.kdim, "vdim": self.vdim, "batch_first": self.batch_first}
        place = {"device": weight.device, "dtype": weight.dtype}
        plain = nn.MultiheadAttention(self.embed_dim, self.num_heads, self.dropout, biased, **layout, **place)
        plain.train(self.training)
        state = {name: x.clone() for name, x in self.state_dict().items() if not name.startswith("W_")}
        E = self.embed_dim
        # T(x W_qᵀ + b_q) = x T(W_qᵀ) + T(b_q), T on the rows of W_qᵀ.
        query = state["in_proj_weight" if self._packed_projection else "q_proj_weight"][:E]
        query.copy_(self._fold_rows(query.T).T)
        if self.in_proj_bias is not None:
            bias = state["in_proj_bias"][:E]
            bias.copy_(self._fold_rows(bias[None])[0])
        plain.load_state_dict(state)
        return plain

    def _fold_rows(self, rows: Tensor) -> Tensor:
        """T on rows (n, E) that hold the heads side by side."""
        heads = _split(rows, self.num_heads)
        with full_precision(rows):  # autocast would round the weights
            metric, backend = Metric(self.W_diag, self.W_blocks), resolve_backend("auto", heads, self.W_blocks)
            return fold_heads(heads, metric, backend=backend).transpose(-3, -2).flatten(-2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with `nn.MultiheadAttention`'s conventions.

        Args:
            query: (L, N, embed_dim), (N, L, embed_dim) with `batch_first`, or (L, embed_dim).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S), or (S,) without a batch: boolean, True where a key is padding, or floating, added.
            need_weights: Return the attention weights too; slower.
            attn_mask: (L, S) or (N·H, L, S): boolean, True where a key may *not* take part, or floating, added.
            average_attn_weights: Return the weights' mean over the heads, (N, L, S), else (N, H, L, S).
            is_causal: With `attn_mask`, a hint that the mask is the causal one; without, query i sees keys 0 to i.

        Returns:
            The output, of query's form, and the weights, or None.
        """
        weights: list[Any] = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        if self._packed_projection:
            weights = [self.in_proj_weight]
        channels, dropout = (self.embed_dim, self.kdim, self.vdim), self.dropout if self.training else 0.0
        layer = _Layer(
            weights, self.in_proj_bias, self.W_diag, self.W_blocks, channels, self.num_heads, self.batch_first, dropout
        )
        heads, attention = attend_heads(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return self.out_proj(heads), attention

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        complete_state_dict(self, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {repr_of_weights(self)}"
