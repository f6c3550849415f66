"""What `training.CachedBackward` takes: inputs of every form, what changes between its passes; and what it refuses."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from support.reference import assert_close
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gssf_triton import training
from gssf_triton.training import CachedBackward

D = 12


class Tokens(NamedTuple):
    """A tokenizer's output."""

    ids: Tensor
    mask: Tensor


class Bag(nn.Module):
    """Takes tokens in any form."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, D)

    def forward(
        self, *args: Any, mask: Tensor | None = None, scale: float = 1.0, names: Any = None, **more: Any
    ) -> Any:
        (tokens,) = args or (more["ids"],)
        if isinstance(tokens, dict):
            tokens, mask = tokens["ids"], tokens["mask"]
        if isinstance(tokens, tuple):
            tokens, mask = tokens.ids, tokens.mask
        assert names is None or len(names) == len(tokens)
        return (self.table(tokens) * mask[:, :, None]).mean(1) * scale


@pytest.mark.parametrize(
    "form",
    [
        lambda ids, mask: ((ids,), {"mask": mask, "scale": 0.5}),
        lambda ids, mask: ((), {"ids": ids, "mask": mask, "names": ["a"] * 7}),
        lambda ids, mask: ((UserDict(ids=ids, mask=mask),), {"names": None}),
        lambda ids, mask: ((Tokens(ids, mask),), {"scale": torch.tensor(2.0)}),
    ],
)
def test_inputs_of_any_form(form: Callable[[Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    args, kwargs = form(torch.randint(0, 50, (7, 5)), torch.rand(7, 5))
    bag = Bag()
    grads = []
    for tower in (CachedBackward(bag, chunk_size=3), bag):
        plain = tuple(dict(x) if isinstance(x, UserDict) else x for x in args)
        tower(*(args if tower is not bag else plain), **kwargs).square().sum().backward()
        grads.append(bag.table.weight.grad)
        bag.zero_grad()
    assert_close(grads[0], grads[1], 2e-6)


class Means(nn.Linear):
    """Takes a list of sets of rows."""

    def forward(self, sets: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(torch.stack([rows.mean(0) for rows in sets]))


def test_gradients_of_a_lists_tensors() -> None:
    tower = Means(6, D).double()
    sets = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (3, 1, 4, 1, 5)]
    ours, theirs = (
        torch.autograd.grad(run([x.sin() for x in sets]).square().sum(), [*sets, *tower.parameters()])
        for run in (CachedBackward(tower, chunk_size=2), tower)
    )
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y, 1e-12)


def test_gradients_of_inputs() -> None:
    """Rows and numbers that come from elsewhere in the graph."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    tower = Scaled(6, D).double()
    grads = []
    for run in (tower, CachedBackward(tower, chunk_size=4)):
        x = torch.linspace(-1, 1, 54, dtype=torch.float64).reshape(9, 6).requires_grad_()
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        loss = run(x.sin(), scale.exp()).square().sum()
        grads.append(torch.autograd.grad(loss, [x, scale, *tower.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, 1e-12)


class Clip(nn.Module):
    """Both towers in one model, called by methods."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.head = nn.Linear(6, D), nn.Linear(5, D), nn.Linear(D, D)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.image(x))
        return out

    def encode_text(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.text(x))
        return out


class Method(nn.Module):
    """One method of a model, as a tower."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *args: Any) -> Any:
        return getattr(self.model, self.name)(*args)


def test_two_methods_of_one_model() -> None:
    """Each tower has parameters that only the other uses, and some that both do."""
    clip = Clip().double()
    images, texts = (CachedBackward(Method(clip, name), chunk_size=4) for name in ("encode_image", "encode_text"))
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    grads = []
    for a, b in ((images(x), texts(y)), (clip.encode_image(x), clip.encode_text(y))):
        grads.append(torch.autograd.grad(((a * b).sum() * clip.log_scale.exp()).sin(), [*clip.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, 1e-12)


def test_changes_between_the_passes_are_refused() -> None:
    x = torch.randn(9, 6)
    tower = CachedBackward(nn.Linear(6, D), chunk_size=4)
    for changed in (x, tower.tower.weight):
        features = tower(x)
        features.sum().backward(retain_graph=True)
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            features.sum().backward()


@pytest.fixture(params=["cached", "as under FSDP"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers under FSDP go another way, which works for any tower."""
    if request.param != "cached":
        monkeypatch.setattr(training, "_is_sharded", lambda tower: True)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("form", [lambda x: x, lambda x: [[row, "name"] for row in x], lambda x: [{"x": r} for r in x]])
def test_changed_tensors_in_lists_are_refused(form: Callable[[list[Tensor]], list[Any]]) -> None:
    """Also those that want no gradient, and deeper in."""

    class Rows(nn.Linear):
        def forward(self, parts: list[Any]) -> Tensor:  # type: ignore[override]
            rows = [x["x"] if isinstance(x, dict) else x[0] if isinstance(x, list) else x for x in parts]
            return super().forward(torch.stack(rows))

    rows = [torch.randn(6) for _ in range(10)]
    features = CachedBackward(Rows(6, D), chunk_size=3)(form(rows))
    rows[9].add_(5)
    with pytest.raises(RuntimeError, match="a tensor in the tower's inputs was changed in place"):
        features.square().sum().backward()


@pytest.mark.usefixtures("both_ways")
def test_a_changed_input_is_refused() -> None:
    x = torch.randn(10, 6)
    features = CachedBackward(nn.Linear(6, D), chunk_size=3)(x)
    x.add_(5)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        features.square().sum().backward()


@pytest.mark.usefixtures("both_ways")
def test_a_list_may_change_between_the_passes() -> None:
    """The list, and lists in it: other entries, fewer of them."""

    class Pairs(nn.Linear):
        def forward(self, pairs: list[list[Tensor]]) -> Tensor:  # type: ignore[override]
            return super().forward(torch.stack([a * b for a, b in pairs]))

    tower = Pairs(6, D).double()
    pairs = [[torch.randn(6, dtype=torch.float64) for _ in range(2)] for _ in range(10)]
    (expected,) = torch.autograd.grad(tower(pairs).square().sum(), [tower.weight])
    features = CachedBackward(tower, chunk_size=3)(pairs)
    pairs[0][1] = torch.zeros(6, dtype=torch.float64)
    pairs[1] = pairs[0]
    del pairs[5:]
    (found,) = torch.autograd.grad(features.square().sum(), [tower.weight])
    assert_close(found, expected, 1e-12)


class Moving(nn.Linear):
    """Its features depend on buffers that each call changes: one in place, one by another in its place."""

    def __init__(self) -> None:
        super().__init__(6, D)
        self.register_buffer("calls", torch.ones(()))
        self.register_buffer("mean", torch.ones(6))
        self.register_buffer("scale", torch.full((6,), 0.5))
        self.register_buffer("unused", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return super().forward((x - self.mean) * self.scale.abs()) * self.calls.clone()


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "moving": Moving,
    "spectral norm": lambda: spectral_norm(nn.Linear(6, D)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, D), nn.Dropout(), nn.BatchNorm1d(D)),
}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)
def test_the_second_pass_finds_what_the_first_found(make: Callable[[], nn.Module], trains: bool) -> None:
    """Buffers and training modes, whatever became of them; and it leaves those of the present, the same tensors."""
    theirs = make().double().train(trains)
    ours = copy.deepcopy(theirs)
    x = torch.randn(10, 6, dtype=torch.float64)
    seed = int(torch.randint(2**31, ()))
    losses = []
    for run in (lambda x: torch.cat([theirs(part) for part in x.split(4)]), CachedBackward(ours, chunk_size=4)):
        torch.manual_seed(seed)
        losses.append(run(x).sin().sum())
    expected = torch.autograd.grad(losses[0], [*theirs.parameters()])
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert p.equal(q)
    ours.train(not trains)
    for buffer in ours.buffers():
        buffer.mul_(100)
    before = [(buffer, buffer.clone(), buffer._version) for buffer in ours.buffers()]
    for again in (True, False):
        found = torch.autograd.grad(losses[1], [*ours.parameters()], retain_graph=again)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 1e-12)
    assert all(module.training is not trains for module in ours.modules())
    for buffer, (same, value, version) in zip(ours.buffers(), before, strict=True):
        assert buffer is same and buffer.equal(value) and buffer._version == version


def test_buffers_that_stay_are_copied_once() -> None:
    """Not once a chunk; and not at all where no backward pass can follow."""
    tower = nn.BatchNorm1d(6).eval()
    copies: list[int] = []
    clone = Tensor.clone
    with mock.patch.object(Tensor, "clone", lambda x, **more: [copies.append(x.dim()), clone(x, **more)][1]):
        CachedBackward(tower, chunk_size=1)(torch.randn(10, 6))
        assert sorted(copies) == [0, 1, 1]
        with torch.no_grad():
            CachedBackward(tower, chunk_size=1)(torch.randn(10, 6))
        assert len(copies) == 3


class Elsewhere(nn.Module):
    """Computes with parameters that are not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Parameter(torch.ones(6)), [nn.Parameter(torch.ones(6))]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.other[0]


def test_parameters_that_are_not_the_towers_are_refused() -> None:
    loss = CachedBackward(Elsewhere(), chunk_size=4)(torch.ones(9, 6)).sum()
    with pytest.raises(RuntimeError, match="reaches none of its parameters"):
        loss.backward()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda t: CachedBackward(len, chunk_size=4),
            TypeError,
            r"tower must be a torch\.nn\.Module, got builtin_function_or_method",
        ),
        (lambda t: CachedBackward(t, chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
        (lambda t: CachedBackward(t, chunk_size=4.0), TypeError, "chunk_size must be an int, got float"),
        (lambda t: CachedBackward(t, chunk_size=4)(), ValueError, "must have rows: tensors or lists, got none"),
        (
            lambda t: CachedBackward(t, chunk_size=4)((torch.ones(9, 6), torch.ones(8)), mask=[1]),
            ValueError,
            r"the same number of rows: input 0\[0\] has 9, input 0\[1\] has 8, input mask has 1",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    call: Callable[[nn.Module], object], error: type[Exception], text: str
) -> None:
    tower = nn.Linear(6, D)
    with (
        mock.patch.object(nn.Linear, "forward", side_effect=AssertionError("it ran")),
        pytest.raises(error, match=text),
    ):
        call(tower)


@pytest.mark.parametrize(
    ("returned", "error", "text"),
    [
        (lambda x: (x, x), TypeError, "what the tower returns must be one tensor of features, got tuple"),
        (lambda x: x.sum(), ValueError, r"must have shape \(4, \.\.\.\), a row for each of its inputs, got \(\)"),
        (lambda x: x[1:], ValueError, r"must have shape \(4, \.\.\.\), a row for each of its inputs, got \(3, 6\)"),
    ],
)
def test_other_results_are_told(returned: Callable[[Tensor], Any], error: type[Exception], text: str) -> None:
    tower = CachedBackward(nn.Identity(), chunk_size=4)
    with mock.patch.object(tower.tower, "forward", returned), pytest.raises(error, match=text):
        tower(torch.ones(9, 6))
