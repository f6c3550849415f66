"""`nn.MultiheadAttention` with GSSF similarities as its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gssf_triton import checks, options
from gssf_triton.heads import (
    add_head_weights,
    check_head_options,
    complete_state_dict,
    fold_heads,
    repr_of_weights,
    reset_head_weights,
)


class GSSFAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with GSSF similarities as its scores, a metric a head, the identity at the start.

    A drop-in: the same arguments, the same parameters under the same names, the same output until the metric is
    trained; `load_state_dict` takes `nn.MultiheadAttention`'s state dict as it is. With `need_weights=False` the
    attention is PyTorch's scaled_dot_product_attention; `need_weights=True`, the default as there, computes and returns
    the weights and is slower, as there. Not taken over: `add_bias_kv`, `add_zero_attn` and nested tensors.

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
        options.check_count("embed_dim", embed_dim, 1)
        options.check_count("num_heads", num_heads, 1)
        for name, channels in (("kdim", kdim), ("vdim", vdim)):
            if channels is not None:
                options.check_count(name, channels, 1)
        options.check_probability("dropout", dropout)
        options.check_flags(bias=bias, batch_first=batch_first)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}, got {num_heads}")
        check_head_options(num_heads, embed_dim // num_heads, block_size, diag, blocks, device, dtype)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self._packed_projection = self._qkv_same_embed_dim
        # nn.TransformerEncoder's fast path would compute plain attention from the projections and never call forward;
        # it stays away from modules that say their projections are not packed.
        self._qkv_same_embed_dim = False
        add_head_weights(self, num_heads, self.head_dim, block_size, diag, blocks, device, dtype)

    def reset_metric(self) -> None:
        """Back to plain attention: the metric is the identity again."""
        reset_head_weights(self)

    @torch.no_grad()
    def merged(self) -> nn.MultiheadAttention:
        """The same attention as a plain `nn.MultiheadAttention`, for serving: T is folded into the query projection."""
        plain = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.in_proj_bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device=self.out_proj.weight.device,
            dtype=self.out_proj.weight.dtype,
        ).train(self.training)
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
        return fold_heads(self._split(rows), self.W_diag, self.W_blocks).transpose(-3, -2).flatten(-2)

    def _split(self, x: Tensor) -> Tensor:
        """(..., L, E) to (..., H, L, D), a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weights: Sequence[Tensor]
        if not self._packed_projection:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

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
        options.check_flags(need_weights=need_weights, average_attn_weights=average_attn_weights, is_causal=is_causal)
        batched = self._check_inputs(query, key, value)
        if not batched and isinstance(key_padding_mask, Tensor):
            key_padding_mask = key_padding_mask.unsqueeze(0)
        batch_dim = 0 if self.batch_first or not batched else 1
        same = query is key and key is value
        inputs = [query] if same else [query, key, value]
        inputs = [x.unsqueeze(0) if not batched else x.transpose(0, batch_dim) for x in inputs]
        N, L, S = inputs[0].shape[0], inputs[0].shape[1], inputs[-1].shape[1]
        checks.check_mask("key_padding_mask", key_padding_mask, "query", query, [(N, S)])
        checks.check_mask("attn_mask", attn_mask, "query", query, [(L, S), (N * self.num_heads, L, S)])

        q, k, v = (self._split(x) for x in self._project(*(inputs * 3 if same else inputs)))
        q = fold_heads(q, self.W_diag, self.W_blocks)
        flag = is_causal and key_padding_mask is None and not need_weights
        if is_causal and not flag and attn_mask is None:
            attn_mask = torch.ones(L, S, dtype=torch.bool, device=query.device).triu(1)
        mask = None if flag else self._merge(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=flag)
        out = self.out_proj(heads.transpose(-3, -2).flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, batch_dim), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs have a batch dimension."""
        for name, x, channels in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            checks.check_features(name, x, min_dim=1)
            if x.is_nested:
                raise ValueError(
                    f"{name} must not be a nested tensor, which nn.TransformerEncoder makes of padded input: "
                    "build it with enable_nested_tensor=False, or set its use_nested_tensor to False"
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != channels:
                form = "(N, L, E)" if self.batch_first else "(L, N, E)"
                like = "" if x is query else f", with as many dimensions as query {tuple(query.shape)}"
                raise ValueError(f"{name} must be {form} or (L, E) with E = {channels}{like}, got {tuple(x.shape)}")
            checks.check_same_device("query", query, name, x)
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and not query.shape[batch_dim] == key.shape[batch_dim] == value.shape[batch_dim]:
            raise ValueError(
                f"query, key and value must have the same batch size in dimension {batch_dim}: query is "
                f"{tuple(query.shape)}, key is {tuple(key.shape)}, value is {tuple(value.shape)}"
            )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key and value must have the same length: key is {tuple(key.shape)}, value is {tuple(value.shape)}"
            )
        return query.dim() == 3

    def _merge(self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one that is added to the scores, broadcasting to (N, H, L, S)."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
        if padding is not None:
            masks.append(padding[:, None, None, :])
        added = [
            torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
            if mask.dtype == torch.bool
            else mask.to(dtype)
            for mask in masks
        ]
        return added[0] if len(added) == 1 else added[0] + added[1] if added else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        complete_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, {repr_of_weights(self)}"
