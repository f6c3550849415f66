"""What happens to a module beside training: partial state dicts, the meta device, export, tracing, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import gssf_triton
from gssf_triton.attention.heads import HeadMetric
from gssf_triton.integrations.sentence_transformers import GSSFSimilarity, PairwiseSimilarity
from gssf_triton.nn import GSSF, DistillationLoss, GSSFAttention, InfoNCELoss, SigmoidLoss, TripletLoss
from gssf_triton.similarity.torch_backend import folds_left
from gssf_triton.tracing import Leaf

D, H = 16, 2


def trained(module: nn.Module) -> nn.Module:
    """Every matrix and vector moved from where it started."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


# ---------------------------------------------------------------------------------------------------------- state dicts


def part_and_head(part: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"part": part, "head": nn.Linear(D, 3)})


def plain_attention(**options: Any) -> dict[str, Tensor]:
    return {f"part.{name}": x for name, x in nn.MultiheadAttention(D, H, **options).state_dict().items()}


HEAD = {"head.weight": torch.zeros(3, D), "head.bias": torch.zeros(3)}
PARTIAL: dict[str, Callable[[], dict[str, Tensor]]] = {
    "nothing": dict,
    "head": lambda: HEAD,
    "biases": lambda: {name: x for name, x in plain_attention().items() if name.endswith("bias")},
    "projection": lambda: {name: x for name, x in plain_attention().items() if "out_proj" not in name},
}


@pytest.mark.parametrize("partial", PARTIAL)
@pytest.mark.parametrize("make", [lambda: GSSFAttention(D, H), lambda: HeadMetric(H, D // H), lambda: GSSF(D, 8)])
def test_a_partial_state_dict_leaves_the_metric_alone(make: Callable[[], nn.Module], partial: str) -> None:
    """As torch documents strict=False: what is not named keeps its value and is reported missing."""
    model = part_and_head(trained(make()))
    metric = {name: x.clone() for name, x in model.state_dict().items() if name.rpartition(".")[2].startswith("W_")}
    given = {name: x for name, x in PARTIAL[partial]().items() if name in model.state_dict()}
    missing = model.load_state_dict(given, strict=False).missing_keys
    assert len(metric) == 2 and set(missing) == set(model.state_dict()) - set(given)
    for name, before in metric.items():
        assert torch.equal(model.state_dict()[name], before)
    with pytest.raises(RuntimeError, match=r"Missing key.*part\.W_diag.*part\.W_blocks"):
        model.load_state_dict(given)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_layers_state_dict_sets_the_identity(strict: bool, options: dict[str, Any]) -> None:
    model = part_and_head(trained(GSSFAttention(D, H, **options)))
    plain = plain_attention(**options)
    found = model.load_state_dict(plain | HEAD, strict=strict)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(model["part"].W_diag, torch.ones(H, D // H)) and not model["part"].W_blocks.any()
    assert not any("W_" in name for name in plain)  # what was given is as it was


@pytest.mark.parametrize("diag", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_from_the_meta_device_a_plain_checkpoint_gives_plain_attention(dtype: torch.dtype, diag: bool) -> None:
    plain = nn.MultiheadAttention(D, H, batch_first=True, dtype=dtype)
    ours = GSSFAttention(D, H, batch_first=True, diag=diag, device="meta")
    ours.load_state_dict(plain.state_dict(), assign=True)
    assert {(w.device.type, w.dtype) for w in ours.parameters()} == {("cpu", dtype)}
    assert ours.W_blocks.requires_grad and isinstance(ours.W_blocks, nn.Parameter)
    x = torch.randn(2, 5, D, dtype=dtype)
    torch.testing.assert_close(ours(x, x, x)[0], plain(x, x, x)[0])
    ours(x, x, x)[0].float().square().sum().backward()
    assert ours.W_blocks.grad.any()


def test_from_the_meta_device_what_is_missing_is_said() -> None:
    model = part_and_head(GSSFAttention(D, H, device="meta"))
    missing = model.load_state_dict(HEAD, strict=False, assign=True).missing_keys
    assert {"part.W_diag", "part.W_blocks", "part.in_proj_weight"} <= set(missing)
    assert model["part"].W_blocks.is_meta and not model["head"].weight.is_meta


@pytest.mark.parametrize(
    "make",
    [lambda: GSSFAttention(D, H), lambda: GSSFAttention(D, H, kdim=5, diag=False), lambda: HeadMetric(H, D // H)],
    ids=["GSSFAttention", "kdim-blocks", "HeadMetric"],
)
def test_what_was_made_on_the_meta_device_can_be_initialised(make: Callable[[], nn.Module]) -> None:
    """As torch's own modules: the same draws as at construction, and the metric the identity."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    torch.manual_seed(5)
    expected = make().state_dict()
    torch.manual_seed(5)
    module.reset_parameters()
    assert expected and all(torch.equal(module.state_dict()[name], x) for name, x in expected.items())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=str)
def test_attention_starts_as_torchs_own(options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    plain = nn.MultiheadAttention(D, H, **options)
    torch.manual_seed(5)
    ours = GSSFAttention(D, H, **options)
    for again in (False, True):
        if again:
            for module in (plain, trained(ours)):
                torch.manual_seed(6)
                module._reset_parameters()
        made = {name: x for name, x in plain.state_dict().items() if name != "out_proj.weight"}
        assert all(torch.equal(ours.state_dict()[name], x) for name, x in made.items())
        assert (ours.W_diag == 1).all() and not ours.W_blocks.any()
    assert ours(*(torch.randn(3, D), torch.randn(4, ours.kdim), torch.randn(4, ours.vdim)))[0].shape == (3, D)


# --------------------------------------------------------------------------------------------------------------- export


class Call(nn.Module):
    """A call as a module."""

    def __init__(self, call: Callable[[nn.Module | None, Tensor, Tensor], Tensor], part: nn.Module | None) -> None:
        super().__init__()
        self.call, self.part = call, part

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.call(self.part, a, b)


W_DIAG, W_BLOCKS = torch.linspace(-1, 1, D), torch.linspace(-1, 2, 2 * 8 * 8).view(2, 8, 8)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def first_rows(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[1]) < 2).expand(x.shape[0], -1)


Exported = tuple[Callable[[Any, Tensor, Tensor], Tensor], Callable[[], nn.Module | None], tuple[int, ...], str]
NO_PART = lambda: None  # noqa: E731
#: The call, its module, a row's shape, and whether both sides have rows of their own or one for each other's.
EXPORTED: dict[str, Exported] = {
    "GSSF": (lambda m, a, b: m(a, b), lambda: GSSF(D, 8), (D,), "any"),
    "GSSF-paired": (lambda m, a, b: m.paired(a, b), lambda: GSSF(D, 8), (D,), "pairs"),
    "GSSF-transform": (lambda m, a, b: m.transform(a) @ m.transform(b, "b").T, lambda: GSSF(D, 8), (D,), "any"),
    "terms": (lambda m, a, b: sum(gssf_triton.pairwise_terms(a, b, W_DIAG, W_BLOCKS)), NO_PART, (D,), "any"),
    "batched": (
        lambda m, a, b: gssf_triton.pairwise_sim(a[None], b.repeat(3, 1, 1), W_DIAG, W_BLOCKS), NO_PART, (D,), "any"
    ),
    "late-interaction": (lambda m, a, b: gssf_triton.late_interaction(a, b, W_DIAG), NO_PART, (5, D), "any"),
    "late-interaction-masks": (
        lambda m, a, b: gssf_triton.late_interaction(
            a, b, W_DIAG, W_BLOCKS, region_mask=first_rows(a), word_mask=first_rows(b), pooling="lse-mean"
        ), NO_PART, (3, D), "any",
    ),
    "cross-attention": (
        lambda m, a, b: gssf_triton.cross_attention_sim(a, b, W_DIAG, region_mask=first_rows(a)), NO_PART, (3, D), "any"
    ),
    "attention": (
        lambda m, a, b: gssf_triton.attention(heads(a), heads(b), heads(b), torch.ones(H, D // H)),
        NO_PART, (3, D), "pairs",
    ),
    "GSSFAttention": (
        lambda m, a, b: m(a, b, b, key_padding_mask=~first_rows(b))[0],
        lambda: GSSFAttention(D, H, batch_first=True), (3, D), "pairs",
    ),
    "HeadMetric": (lambda m, a, b: m(heads(a)).sum() + m(heads(b)), lambda: HeadMetric(H, D // H), (3, D), "any"),
    "InfoNCELoss": (
        lambda m, a, b: m(a, b, torch.arange(a.shape[0]) // 2), lambda: InfoNCELoss(GSSF(D, 8)), (D,), "pairs"
    ),
    "SigmoidLoss": (lambda m, a, b: m(a, b), lambda: SigmoidLoss(GSSF(D, 8)), (D,), "pairs"),
    "TripletLoss": (lambda m, a, b: m(a, b), lambda: TripletLoss(GSSF(D, 8)), (D,), "pairs"),
    "DistillationLoss": (lambda m, a, b: m(a, b, a, b), lambda: DistillationLoss(GSSF(D, 8)), (D,), "any"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_with_any_number_of_rows(name: str) -> None:
    """One graph for few rows and many, whichever side has more: nothing is fixed by the sizes it was traced with."""
    call, make, row, rows = EXPORTED[name]
    part = make()
    module = Call(call, None if part is None else trained(part)).eval()
    n, m = Dim("n", min=2), Dim("m", min=2)
    shapes = ({0: n}, {0: n if rows == "pairs" else m})
    a, b = (torch.randn(size, *row) for size in ((6, 6) if rows == "pairs" else (4, 7)))
    exported = torch.export.export(module, (a, b), dynamic_shapes=shapes, strict=name == "GSSF").module()
    for sizes in ((3, 3), (19, 19)) if rows == "pairs" else ((19, 3), (2, 31), (8, 8)):
        a, b = (torch.randn(size, *row) for size in sizes)
        torch.testing.assert_close(exported(a, b), module(a, b), rtol=1e-4, atol=1e-5)


def test_the_smaller_side_is_still_folded_where_sizes_are_known() -> None:
    few, many = torch.empty(3, D), torch.empty(5, D)
    assert folds_left(few, many) and folds_left(few, few) and not folds_left(many, few)


# -------------------------------------------------------------------------------------------------------------- tracing


TRACED: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "GSSF": (lambda: GSSF(D, 8), lambda: (torch.randn(4, D), torch.randn(7, D))),
    "HeadMetric": (lambda: HeadMetric(H, D // H), lambda: (torch.randn(3, H, 5, D // H),)),
    "GSSFAttention": (lambda: GSSFAttention(D, H), lambda: (torch.randn(5, 2, D),) * 3),
    "InfoNCELoss": (lambda: InfoNCELoss(GSSF(D, 8)), lambda: (torch.randn(6, D), torch.randn(6, D))),
    "SigmoidLoss": (lambda: SigmoidLoss(GSSF(D, 8)), lambda: (torch.randn(6, D), torch.randn(6, D))),
    "TripletLoss": (lambda: TripletLoss(GSSF(D, 8)), lambda: (torch.randn(6, D), torch.randn(6, D))),
    "GSSFSimilarity": (lambda: GSSFSimilarity(D, 8), lambda: (torch.randn(4, D), torch.randn(7, D))),
    "PairwiseSimilarity": (
        lambda: PairwiseSimilarity(GSSFSimilarity(D, 8)),
        lambda: (torch.randn(5, D), torch.randn(5, D)),
    ),
    "DistillationLoss": (lambda: DistillationLoss(GSSF(D, 8), GSSF(D, 8)), lambda: tuple(torch.randn(4, 6, D))),
}


class Around(nn.Module):
    """A model around a module, with as many inputs as it takes."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.shift = nn.Parameter(torch.tensor(0.1))

    def forward(self, a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None) -> Any:
        return self.part(*[x for x in (a + self.shift, b, c, d) if x is not None])


@pytest.mark.parametrize("where", ["inside", "itself"])
@pytest.mark.parametrize("name", TRACED)
def test_fx_traces_it_as_one_step(name: str, where: str) -> None:
    make, inputs = TRACED[name]
    part, given = trained(make()), inputs()
    absent = dict.fromkeys("bcd"[len(given) - 1 :])
    model = Around(part) if where == "inside" else part
    traced = torch.fx.symbolic_trace(model, concrete_args=absent if where == "inside" else None)
    call = given if where == "itself" else (*given, *absent.values())
    if where == "inside":
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["part"]
    results = []
    for one in (model, traced, copy.deepcopy(traced)):
        one.zero_grad()
        out = first(one(*call))
        out.square().sum().backward()
        results.append((out.detach(), {k: p.grad.clone() for k, p in one.named_parameters() if p.grad is not None}))
    (expected, grads), *others = results
    for out, found in others:
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert found.keys() == grads.keys() and all(torch.equal(found[k], grads[k]) for k in grads)
    assert not any(isinstance(x, torch.fx.Proxy) for module in model.modules() for x in vars(module).values())


def test_fx_traces_methods_and_functions() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.metric = trained(GSSF(D, 8))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            scores = self.metric.transform(a) @ b.T + self.metric.paired(a, b) + self.metric.dense().sum()
            return scores + gssf_triton.pairwise_sim(a, b, self.metric.W_diag, backend="torch")

    model, a, b = Model(), torch.randn(4, D), torch.randn(4, D)
    assert torch.equal(torch.fx.symbolic_trace(model)(a, b), model(a, b))


def test_fx_traces_a_similaritys_methods() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.similarity = trained(GSSFSimilarity(D, 8))

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.similarity.pairwise(a, b), self.similarity.score(a, b)

    model, a, b = Model(), torch.randn(4, D), torch.randn(4, D)
    for one in (model, torch.fx.symbolic_trace(model)):
        pairs, scores = one(a, b)
        torch.testing.assert_close(pairs, scores.diagonal())
        assert torch.equal(pairs, model(a, b)[0]) and torch.equal(scores, model(a, b)[1])
        assert pairs.requires_grad and not scores.requires_grad


def test_fx_traces_inputs_that_hold_inputs() -> None:
    class Part(Leaf):
        def forward(self, columns: list[dict[str, Tensor]], scale: Tensor) -> Tensor:
            return sum(column["x"].sum() for column in columns) * scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.part([{"x": a}, {"x": b}], 2.0)

    traced = torch.fx.symbolic_trace(Model())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["part"]
    assert traced(torch.ones(2), torch.ones(3)) == 10


def test_a_traced_models_dropout_follows_its_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = GSSFAttention(D, H, dropout=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model, x = Model().train(), torch.randn(9, 2, D)
    traced = torch.fx.symbolic_trace(model)
    assert not torch.equal(traced(x), traced(x))
    assert torch.equal(traced.eval()(x), model.eval()(x))


# --------------------------------------------------------------------------------------------------------------- copies


def reloaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(module: nn.Module) -> nn.Module:
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    return average.module


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": reloaded,
    "average": averaged,
    "devices": lambda m: copy.deepcopy(m).to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", ["GSSF", "GSSFAttention", "HeadMetric"])
def test_copies_are_the_module(name: str, copied: str) -> None:
    """After a pass under inference_mode too: nothing of it is left in the module."""
    make, inputs = TRACED[name]
    module, given = trained(make()), inputs()
    with torch.inference_mode():
        expected = first(module(*given)).clone()
    other = COPIES[copied](module)
    if copied == "devices":
        other.load_state_dict(module.state_dict())
    out = first(other(*given))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad is not None for p in other.parameters()) and all(p.grad is None for p in module.parameters())
