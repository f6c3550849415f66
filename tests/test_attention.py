"""Attention: softmax(T(q) kᵀ · scale + mask) v against float64, and GSSFAttention in nn.MultiheadAttention's place."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from support import reference
from support.reference import assert_close, features, tolerance
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import gssf_triton
from gssf_triton.attention.heads import HeadMetric
from gssf_triton.nn import GSSFAttention

# ---------------------------------------------------------------- the function


def head_weights(form: str, H: int, G: int, B: int, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """The weights a form names: of each of "diag" and "blocks", "shared" or "heads" (one a head)."""
    made: dict[str, Tensor | None] = {"W_diag": None, "W_blocks": None}
    for part in form.split("+"):
        name, kind = part.split("-")
        heads = (H,) if kind == "heads" else ()
        shape = (G * B,) if name == "diag" else (G, B, B)
        made[f"W_{name}"] = (0.5 * torch.randn(*heads, *shape, dtype=torch.float64)).to(device, dtype)
    return made


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The scores head by head from each head's dense metric, then the softmax written out."""
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
    shared_diag = W_diag is None or W_diag.dim() == 1
    shared_blocks = W_blocks is None or W_blocks.dim() == 3
    scores = []
    for h in range(q.shape[-3]):
        diag = W_diag if shared_diag else W_diag[h]
        blocks = W_blocks if shared_blocks else W_blocks[h]
        metric = reference.dense_metric(diag, blocks)
        scores.append(torch.einsum("...im,mn,...jn->...ij", q[..., h, :, :], metric, k[..., h, :, :]))
    S = torch.stack(scores, dim=-3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        i, j = torch.arange(S.shape[-2])[:, None], torch.arange(S.shape[-1])
        attn_mask = (j <= i).to(S.device)
    if attn_mask is not None:
        S = S.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else S + attn_mask
    return S.exp() / S.exp().sum(-1, keepdim=True) @ v


FORMS = ["diag-shared", "blocks-shared", "diag-shared+blocks-shared", "diag-heads", "blocks-heads"]
FORMS += ["diag-heads+blocks-heads", "diag-shared+blocks-heads", "diag-heads+blocks-shared"]


def _check(tensors: dict[str, Tensor | None], tol: float, **options: Any) -> None:
    """Values and the gradients of all tensors against float64."""
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x is not None}
    out = gssf_triton.attention(**tensors, **options)
    incoming = torch.randn_like(out)
    out.backward(incoming)
    wide = {name: None if x is None else x.detach().double().requires_grad_() for name, x in tensors.items()}
    options.pop("backend", None)
    if options.get("attn_mask") is not None and options["attn_mask"].dtype != torch.bool:
        options["attn_mask"] = options["attn_mask"].double()
    expected = exact(**wide, **options)
    expected.backward(incoming.double())
    assert out.dtype == tensors["v"].dtype
    assert_close(out, expected, tol, name="attention")
    for name, x in leaves.items():
        assert x.grad.dtype == x.dtype
        assert_close(x.grad, wide[name].grad, tol, name=f"d{name}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_form_of_weights(form: str, dtype: torch.dtype, backend: str, device: str) -> None:
    q, k, v = (features(2, 3, n, d, dtype=dtype, device=device) for n, d in ((5, 24), (7, 24), (7, 11)))
    weights = head_weights(form, 3, 3, 8, dtype, device)
    _check({"q": q, "k": k, "v": v, **weights}, tolerance(dtype), backend=backend)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 3, 13), (3, 5, 1, 17), (1, 4, 33, 6)], ids=str)
def test_awkward_shapes(shape: tuple[int, ...], backend: str, device: str) -> None:
    N, H, L, D = shape
    q, k, v = (features(N, H, n, D, device=device) for n in (L, 3, 3))
    weights = head_weights("diag-heads+blocks-heads", H, 1, D, torch.float32, device)
    # Of one number, a difference of nearly equal ones, the error is not averaged over anything.
    _check({"q": q, "k": k, "v": v, **weights}, (5 if H * L == 1 else 1) * tolerance(torch.float32), backend=backend)


def _masks(device: str) -> dict[str, dict[str, Any]]:
    keep = torch.rand(2, 3, 5, 7, device=device) < 0.6
    keep[..., :2] = True  # of a single key the weight is 1 and q's gradient 0: nothing to be relative to
    return {
        "none": {},
        "bool": {"attn_mask": keep},
        "bool-broadcast": {"attn_mask": keep[:1, :1, :1]},
        "float": {"attn_mask": torch.randn(5, 7, device=device)},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.7},
        "causal-scale-0": {"is_causal": True, "scale": 0.0},
        "causal-scale-negative": {"is_causal": True, "scale": -0.3},
    }


@pytest.mark.parametrize("name", _masks("cpu"))
def test_masks_and_scale(name: str, device: str) -> None:
    q, k, v = (features(2, 3, n, 16, device=device) for n in (5, 7, 7))
    weights = head_weights("diag-heads+blocks-heads", 3, 2, 8, torch.float32, device)
    _check({"q": q, "k": k, "v": v, **weights}, tolerance(torch.float32), **_masks(device)[name])


def test_leading_dimensions_broadcast_and_may_be_missing(device: str) -> None:
    q, k = features(3, 5, 16, device=device), features(2, 1, 7, 16, device=device)
    v = features(2, 3, 7, 16, device=device)
    _check({"q": q, "k": k, "v": v, **head_weights("blocks-heads", 3, 2, 8, q.dtype, device)}, tolerance(q.dtype))
    weights = head_weights("diag-shared+blocks-shared", 1, 2, 8, q.dtype, device)
    alone = gssf_triton.attention(q[0], k[0, 0], v[0, 0], **weights)
    stacked = gssf_triton.attention(q[None, :1], k[:1], v[:1, :1], **weights)
    assert_close(alone, stacked[0, 0].double(), tolerance(q.dtype))


def test_heads_split_as_a_view(backend: str, device: str) -> None:
    """Non-contiguous q, as an attention layer has it, and features in a strided slice."""
    packed = features(2, 5, 3 * 48, device=device)
    q, k, v = (x.unflatten(-1, (3, 16)).transpose(1, 2) for x in packed.chunk(3, -1))
    weights = head_weights("diag-heads+blocks-heads", 3, 2, 8, torch.float32, device)
    assert_close(
        gssf_triton.attention(q, k, v, **weights, backend=backend),
        exact(*(x.double() for x in (q, k, v)), *(w.double() for w in weights.values())),
        tolerance(torch.float32),
    )


def test_every_call_is_checked_as_the_first(device: str) -> None:
    """What is remembered of a call that fits must not let one pass that only looks like it."""
    q = features(2, 3, 5, 16, device=device)
    W_diag = torch.ones(16, device=device)

    def attend(**options: Any) -> Tensor:
        return gssf_triton.attention(**{"q": q, "k": q, "v": q, "W_diag": W_diag, "scale": 1.0} | options)

    for _ in range(2):
        assert torch.equal(attend(), nn.functional.scaled_dot_product_attention(q, q, q, scale=1.0))
        with torch.autocast(device, dtype=torch.bfloat16):  # which takes keys of another dtype
            attend(k=q.bfloat16())
        for wrong, error, said in (
            ({"is_causal": 0}, TypeError, "is_causal must be True or False"),
            ({"scale": True}, TypeError, "scale must be a number"),
            ({"dropout_p": False}, TypeError, "dropout_p must be a number"),
            ({"q": q.tolist()}, TypeError, "q must be a torch.Tensor, got list"),
            ({"k": q.bfloat16()}, ValueError, "q and k must have the same dtype"),
            ({"v": q[:, :, 1:]}, ValueError, "k and v must have the same number of rows"),
            ({"W_diag": W_diag.long()}, ValueError, "W_diag must be float16"),
            ({"attn_mask": torch.ones(5, 4, device=device)}, ValueError, "attn_mask must broadcast"),
            ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ):
            with pytest.raises(error, match=said):
                attend(**wrong)


def test_traces_with_symbolic_sizes(device: str) -> None:
    weights = tuple(head_weights("diag-heads+blocks-heads", 3, 2, 8, torch.float32, device).values())

    def attend(q: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
        return gssf_triton.attention(q, k, k, *weights, backend="torch")

    few, many = ([features(2, 3, n, 16, device=device) for n in lengths] for lengths in ((5, 7), (6, 9)))
    traced = make_fx(attend, tracing_mode="symbolic")(*few, *weights)
    assert torch.equal(traced(*many, *weights), attend(*many, *weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_adds_no_error_of_its_own(dtype: torch.dtype, backend: str, device: str) -> None:
    """Off by no more than the same attention on an exact T(q) rounded to the same dtype, plus the table's tolerance."""
    q, k, v = (features(2, 3, 9, 16, dtype=dtype, device=device) for _ in range(3))
    weights = head_weights("diag-heads+blocks-heads", 3, 2, 8, torch.float32, device)
    ours = gssf_triton.attention(q, k, v, **weights, backend=backend)
    wide = [x.double() for x in (q, k, v)]
    expected = exact(*wide, *(w.double() for w in weights.values()))
    metrics = torch.stack(
        [reference.dense_metric(d.double(), b.double()) for d, b in zip(*weights.values(), strict=True)]
    )
    folded = (wide[0] @ metrics).to(dtype)
    theirs = nn.functional.scaled_dot_product_attention(folded, k, v)
    allowed = float((theirs.double() - expected).norm() / expected.norm()) + tolerance(dtype)
    assert ours.dtype == dtype
    assert_close(ours, expected, allowed)


@pytest.mark.parametrize("call", ["function", "module"])
def test_the_attention_is_pytorchs_own_on_the_folded_queries(
    call: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    real = nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q, k, v))
        return real(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    if call == "function":
        q, k, v = (features(2, 3, 5, 8, device=device) for _ in range(3))
        weights = head_weights("diag-heads+blocks-heads", 3, 2, 4, torch.float32, device)
        out = gssf_triton.attention(q, k, v, **weights)
        dense = [reference.dense_metric(*(w[h].double() for w in weights.values())) for h in range(3)]
        assert_close(seen[0][0], q.double() @ torch.stack(dense), tolerance(torch.float32))
        assert torch.equal(seen[0][1], k) and torch.equal(out, real(*seen[0]))
    else:
        module = GSSFAttention(24, 3, batch_first=True, device=device)
        x = features(2, 5, 24, device=device)
        module(x, x, x, need_weights=False)
    assert len(seen) == 1


@pytest.mark.parametrize("lead", [(), (3,)], ids=["two", "three"])
def test_fewer_than_four_dimensions_take_a_gpus_fused_kernels_too(
    lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """They want four. On a CPU the call is as it comes, which leaves it a second derivative."""
    real, seen = nn.functional.scaled_dot_product_attention, []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(q.dim())
        return real(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = (features(*lead, n, 8, device=device) for n in (5, 7, 7))
    W_diag, mask = torch.randn(8, device=device), torch.randn(5, 7, device=device)
    out = gssf_triton.attention(q, k, v, W_diag, attn_mask=mask)
    assert seen == [4 if device == "cuda" else q.dim()]
    folded = q.double() * W_diag.double()
    assert_close(out, real(folded, k.double(), v.double(), attn_mask=mask.double()), tolerance(torch.float32))


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0)], ids=["no-queries", "no-keys"])
def test_empty(lengths: tuple[int, int], device: str) -> None:
    q, k, v = (features(2, 3, n, 16, device=device).requires_grad_() for n in (lengths[0], lengths[1], lengths[1]))
    weights = head_weights("diag-heads+blocks-heads", 3, 2, 8, torch.float32, device)
    out = gssf_triton.attention(q, k, v, **weights)
    assert out.shape == (2, 3, lengths[0], 16) and not out.any()
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))


# ---------------------------------------------------------------- the module

E, HEADS = 48, 3


def pair_of_modules(device: str, **options: Any) -> tuple[nn.MultiheadAttention, GSSFAttention]:
    """nn.MultiheadAttention with every parameter random, and ours with its state dict; both in float64, to compare."""
    plain = nn.MultiheadAttention(E, HEADS, **options).to(device, torch.float64)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2)
    ours = GSSFAttention(E, HEADS, **options).to(device, torch.float64)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def randomise(*modules: nn.Module) -> None:
    with torch.no_grad():
        for module in modules:
            module.W_diag.normal_()
            module.W_blocks.normal_(std=0.3)


def inputs(device: str, batch_first: bool, kdim: int = E, vdim: int = E, N: int = 2, L: int = 5, S: int = 7) -> Any:
    sizes = [(L, E), (S, kdim), (S, vdim)]
    return [features(*((N, n, d) if batch_first else (n, N, d)), dtype=torch.float64, device=device) for n, d in sizes]


def call_masks(device: str) -> dict[str, dict[str, Any]]:
    """Masks of nn.MultiheadAttention's kinds: True and −inf keep a key out; key 0 always stays in."""
    out = torch.rand(5, 7, device=device) < 0.4
    out[:, 0] = False
    per_head = torch.rand(2 * HEADS, 5, 7, device=device) < 0.4
    per_head[..., 0] = False
    padding = torch.arange(7, device=device) >= torch.tensor([[7], [4]], device=device)
    added = torch.zeros(2, 7, dtype=torch.float64, device=device).masked_fill(padding, float("-inf"))
    return {
        "no-mask": {},
        "attn-bool": {"attn_mask": out},
        "attn-float": {"attn_mask": torch.randn(5, 7, dtype=torch.float64, device=device)},
        "attn-heads": {"attn_mask": per_head},
        "padding-bool": {"key_padding_mask": padding},
        "padding-float": {"key_padding_mask": added},
        "both-bool": {"attn_mask": out, "key_padding_mask": padding},
        "both-float": {"attn_mask": torch.randn(5, 7, dtype=torch.float64, device=device), "key_padding_mask": added},
    }


def assert_same(actual: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    assert_close(actual[0], expected[0], tolerance(torch.float64), name="output")
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert_close(actual[1], expected[1], tolerance(torch.float64), name="weights")


@pytest.mark.parametrize("mask", call_masks("cpu"))
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
def test_same_output_as_multihead_attention(mask: str, weights: dict[str, bool], device: str) -> None:
    plain, ours = pair_of_modules(device, batch_first=True)
    x, options = inputs(device, True), call_masks(device)[mask] | weights
    assert_same(ours(*x, **options), plain(*x, **options))


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "length-first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dims", [{}, {"kdim": 20}, {"kdim": 20, "vdim": 9}], ids=str)
def test_same_output_in_every_construction(batch_first: bool, bias: bool, dims: dict[str, int], device: str) -> None:
    plain, ours = pair_of_modules(device, batch_first=batch_first, bias=bias, **dims)
    x = inputs(device, batch_first, **dims)
    assert_same(ours(*x), plain(*x))
    if not dims:
        assert_same(ours(x[1], x[1], x[1]), plain(x[1], x[1], x[1]))
        assert_same(ours(x[0], x[1], x[1]), plain(x[0], x[1], x[1]))


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "length-first"])
def test_without_a_batch(batch_first: bool, device: str) -> None:
    plain, ours = pair_of_modules(device, batch_first=batch_first)
    q, k, v = (x[0] for x in inputs(device, True))
    padding = torch.arange(7, device=device) > 4
    assert_same(ours(q, k, v), plain(q, k, v))
    assert_same(ours(q, k, v, key_padding_mask=padding), plain(q, k, v, key_padding_mask=padding))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal(need_weights: bool, padded: bool, device: str) -> None:
    plain, ours = pair_of_modules(device, batch_first=True)
    x = inputs(device, True)[1]
    mask = nn.Transformer.generate_square_subsequent_mask(7, device=device, dtype=torch.float64)
    options: dict[str, Any] = {"need_weights": need_weights}
    if padded:
        options["key_padding_mask"] = call_masks(device)["padding-float"]["key_padding_mask"]
    expected = plain(x, x, x, attn_mask=mask, **options)
    assert_same(ours(x, x, x, attn_mask=mask, **options), expected)
    assert_same(ours(x, x, x, attn_mask=mask, is_causal=True, **options), expected)
    assert_same(ours(x, x, x, is_causal=True, **options), expected)


def test_same_seed_same_start() -> None:
    torch.manual_seed(7)
    plain = nn.MultiheadAttention(E, HEADS)
    torch.manual_seed(7)
    ours = GSSFAttention(E, HEADS)
    assert isinstance(ours, nn.MultiheadAttention)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name))


@pytest.mark.parametrize("need_weights", [True, False])
def test_trained_metric(need_weights: bool, device: str) -> None:
    """The scores under each head's own metric, from the projections written out."""
    _, ours = pair_of_modules(device, batch_first=True)
    randomise(ours)
    q, k, v = inputs(device, True)
    projected = [
        (x @ w.T + b).unflatten(-1, (HEADS, E // HEADS)).transpose(1, 2)
        for x, w, b in zip((q, k, v), ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True)
    ]
    heads = exact(*projected, ours.W_diag, ours.W_blocks)
    expected = heads.transpose(1, 2).flatten(2) @ ours.out_proj.weight.T + ours.out_proj.bias
    assert_close(ours(q, k, v, need_weights=need_weights)[0], expected, tolerance(torch.float64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [{}, {"kdim": 20, "vdim": 9}], ids=str)
def test_merged_is_the_same_attention(bias: bool, dims: dict[str, int], device: str) -> None:
    _, ours = pair_of_modules(device, batch_first=True, bias=bias, **dims)
    randomise(ours)
    merged = ours.eval().merged()
    assert type(merged) is nn.MultiheadAttention and not merged.training
    x = inputs(device, True, **dims)
    assert_same(merged(*x), ours(*x))


def test_every_parameter_learns(device: str) -> None:
    _, ours = pair_of_modules(device, batch_first=True)
    ours(*inputs(device, True), need_weights=False)[0].square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_encoder_layers_use_the_metric_in_evaluation_too(device: str) -> None:
    """nn.TransformerEncoder's fast path would go round forward()."""
    layer = nn.TransformerEncoderLayer(E, 4, 64, dropout=0.0, batch_first=True, device=device, dtype=torch.float64)
    swapped = copy.deepcopy(layer)
    swapped.self_attn = GSSFAttention(E, 4, batch_first=True, device=device, dtype=torch.float64)
    swapped.self_attn.load_state_dict(layer.self_attn.state_dict())
    x = inputs(device, True)[1]
    padding = call_masks(device)["padding-bool"]["key_padding_mask"]
    real = ~padding[..., None]
    plain, ours = (nn.TransformerEncoder(one, 2, enable_nested_tensor=False).eval() for one in (layer, swapped))
    with torch.no_grad():
        expected = plain(x, src_key_padding_mask=padding) * real
        assert_close(ours(x, src_key_padding_mask=padding) * real, expected, tolerance(torch.float64))
        randomise(*(layer.self_attn for layer in ours.layers))
        trained = ours(x, src_key_padding_mask=padding) * real
        assert not torch.allclose(trained, expected)
        assert_close(trained, ours.train()(x, src_key_padding_mask=padding) * real, tolerance(torch.float64))


def test_an_encoder_that_nests_its_input_says_how_not_to(device: str) -> None:
    layer = nn.TransformerEncoderLayer(E, 4, 64, batch_first=True, device=device)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    encoder.layers[0].self_attn = GSSFAttention(E, 4, batch_first=True, device=device)
    x, padding = (
        features(2, 7, E, device=device),
        torch.arange(7, device=device) >= torch.tensor([[7], [4]], device=device),
    )
    with torch.no_grad():
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match=r"enable_nested_tensor=False.*use_nested_tensor"),
        ):
            warnings.simplefilter("ignore")  # torch says once a process that nested tensors are a prototype
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        assert encoder(x, src_key_padding_mask=padding).shape == x.shape


def test_in_a_decoder_layer(device: str) -> None:
    layer = nn.TransformerDecoderLayer(E, 4, 64, dropout=0.0, device=device, dtype=torch.float64)
    x, memory, _ = inputs(device, False)
    mask = nn.Transformer.generate_square_subsequent_mask(5, device=device, dtype=torch.float64)
    expected = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
    for name in ("self_attn", "multihead_attn"):
        ours = GSSFAttention(E, 4, device=device, dtype=torch.float64)
        ours.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, ours)
    assert_close(layer(x, memory, tgt_mask=mask, tgt_is_causal=True), expected, tolerance(torch.float64))


def test_dropout(device: str) -> None:
    _, ours = pair_of_modules(device, dropout=1.0)
    x = inputs(device, False)
    for need_weights in (True, False):  # every weight dropped: only the last bias is left, and only in training
        out = ours.train()(*x, need_weights=need_weights)[0]
        assert_close(out, ours.out_proj.bias.expand_as(out), tolerance(torch.float64))
        assert not torch.allclose(ours.eval()(*x, need_weights=need_weights)[0], out)


def test_state_dicts(device: str) -> None:
    plain, ours = pair_of_modules(device)
    randomise(ours)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = GSSFAttention(E, HEADS).to(device, torch.float64)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x = inputs(device, False)
    assert torch.equal(loaded(*x)[0], ours(*x)[0])
    # Plain attention's state sets the metric back; one weight without the other is a fault.
    loaded.load_state_dict(plain.state_dict())
    assert torch.equal(loaded.W_diag, torch.ones_like(loaded.W_diag)) and not loaded.W_blocks.any()
    state = ours.state_dict()
    del state["W_blocks"]
    with pytest.raises(RuntimeError, match="W_blocks"):
        loaded.load_state_dict(state)
    assert "W_diag" not in plain.state_dict()


def test_inside_another_module_plain_states_load(device: str) -> None:
    plain, ours = pair_of_modules(device)
    outer = nn.ModuleDict({"layer": ours})
    randomise(ours)
    outer.load_state_dict(nn.ModuleDict({"layer": plain}).state_dict())
    assert not ours.W_blocks.any()


def test_block_sizes() -> None:
    assert GSSFAttention(64, 1).W_blocks.shape == (1, 2, 32, 32)
    assert GSSFAttention(64, 8).W_blocks.shape == (8, 1, 8, 8)
    assert GSSFAttention(80, 1).W_blocks.shape == (1, 4, 20, 20)
    assert GSSFAttention(74, 2).W_blocks.shape == (2, 37, 1, 1)
    assert GSSFAttention(64, 2, block_size=16).W_blocks.shape == (2, 2, 16, 16)
    only_blocks = GSSFAttention(64, 2, diag=False)
    assert only_blocks.W_diag is None and torch.equal(only_blocks.W_blocks[1, 0], torch.eye(32))
    only_diag = GSSFAttention(64, 2, blocks=False)
    assert only_diag.W_blocks is None and torch.equal(only_diag.W_diag, torch.ones(2, 32))
    x = torch.randn(3, 2, 64)
    for module in (only_blocks, only_diag):
        assert_close(module(x, x, x)[0], module.merged()(x, x, x)[0].double(), tolerance(torch.float32))
    assert "W_blocks=(2, 2, 16, 16)" in repr(GSSFAttention(64, 2, block_size=16))


def test_copies_and_autocast(device: str) -> None:
    ours = GSSFAttention(E, HEADS, batch_first=True).to(device)
    randomise(ours)
    x = features(2, 5, E, device=device)
    assert torch.equal(copy.deepcopy(ours)(x, x, x)[0], ours(x, x, x)[0])
    for need_weights in (True, False):
        with torch.autocast(device, dtype=torch.bfloat16):
            out = ours(x, x, x, need_weights=need_weights)[0]
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert ours.W_blocks.grad.dtype == torch.float32
        assert torch.allclose(out.float(), ours(x, x, x)[0], atol=0.05)


def test_compiles_whole(device: str) -> None:
    ours = GSSFAttention(E, HEADS, batch_first=True).to(device)
    x = features(2, 5, E, device=device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for options in ({"need_weights": False}, {"is_causal": True, "need_weights": False}, {}):
        assert_close(compiled(x, x, x, **options)[0], ours(x, x, x, **options)[0].double(), tolerance(torch.float32))


def test_head_metric_is_the_fold_alone(device: str) -> None:
    metric = HeadMetric(3, 16, block_size=8).to(device)
    q = features(2, 3, 5, 16, device=device)
    assert torch.equal(metric(q), q)
    randomise(metric)
    dense = [reference.dense_metric(metric.W_diag[h].double(), metric.W_blocks[h].double()) for h in range(3)]
    assert_close(metric(q), q.double() @ torch.stack(dense), tolerance(torch.float32))
    metric.reset_metric()
    assert torch.equal(metric(q), q)
