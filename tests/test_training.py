"""`training.CachedBackward`: a tower in chunks, with the gradients of the whole batch."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.fx
from support.gloo import in_processes
from support.reference import assert_close, tolerance
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import gssf_triton
from gssf_triton import training
from gssf_triton.autotune.stub import stub_gpu
from gssf_triton.nn import GSSF, DistillationLoss, InfoNCELoss, SigmoidLoss, TripletLoss
from gssf_triton.training import CachedBackward

D = 12
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "info_nce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
    "hinge": TripletLoss,
    "all": partial(TripletLoss, hardest=False),
    "distillation": DistillationLoss,
    "weighted": partial(InfoNCELoss, reduction="none"),
}
Wrap = Callable[[nn.Module], nn.Module]


class Chunked(nn.Module):
    """What `CachedBackward` is to equal: the same chunks, all of them with their graph."""

    def __init__(self, tower: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.tower, self.chunk_size = tower, chunk_size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower(part) for part in x.split(self.chunk_size)])


def whole(tower: nn.Module) -> nn.Module:
    return tower


def in_chunks_of(size: int) -> Wrap:
    return lambda tower: CachedBackward(tower, chunk_size=size)


class Model(nn.Module):
    """Two towers, or one for both sides, and a loss; the same parameters at every call of the same seed."""

    def __init__(self, loss: str, wrap: Wrap = whole, *, dropout: float = 0.0, shared: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(5)
        left, right = (
            nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, D)) for _ in range(2)
        )
        metric = GSSF(D, block_size=4)
        with torch.no_grad():
            for weight in metric.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        self.left = wrap(left)
        self.right = self.left if shared else wrap(right)
        self.loss = LOSSES[loss](metric, **options)

    def forward(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        a, b = self.left(x), self.right(y)
        out: Tensor = self.loss(a, b, x, y) if isinstance(self.loss, DistillationLoss) else self.loss(a, b, ids)
        return (out * torch.linspace(-1, 1, len(out), dtype=out.dtype)).sum() if out.dim() else out


def batch(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 6, dtype=dtype), torch.randn(rows, 6, dtype=dtype), torch.randint(0, rows, (rows,))


def gradient(model: nn.Module) -> Tensor:
    """Of all parameters, as one vector: those of a scale alone may cancel to nothing."""
    found = []
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        assert grad is not None and grad.dtype == p.dtype, name
        found.append(grad.flatten())
    return torch.cat(found)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tol: float) -> None:
    assert_close(gradient(ours), gradient(theirs), tol)


@pytest.fixture(params=["cached", "as under FSDP"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers under FSDP go another way, which works for any tower."""
    if request.param != "cached":
        monkeypatch.setattr(training, "_is_sharded", lambda tower: True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["two towers", "one tower"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_the_whole_batchs(loss: str, shared: bool, dtype: torch.dtype) -> None:
    """In value, towers, metric and scale; with ids; for one row a chunk, ragged chunks and more than the batch."""
    x, y, ids = batch(11, dtype)
    theirs = Model(loss, shared=shared).to(dtype)
    expected = theirs(x, y, ids)
    expected.backward()
    for size in (1, 4, 100):
        ours = Model(loss, in_chunks_of(size), shared=shared).to(dtype)
        value = ours(x, y, ids)
        value.backward()
        # A loss is a difference of logits, and its error is theirs.
        assert_close(value, expected, tolerance(dtype), size=torch.full_like(expected, 10.0))
        assert_same_gradients(ours, theirs, tolerance(dtype))


def test_gradients_accumulate() -> None:
    x, y, ids = batch(7)
    ours, theirs = Model("info_nce", in_chunks_of(3)).double(), Model("info_nce").double()
    for model in (ours, theirs):
        for weight in (0.25, 0.75):
            (weight * model(x, y, ids)).backward()
    assert_same_gradients(ours, theirs, 1e-12)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("shared", [False, True], ids=["two towers", "one tower"])
def test_random_state_is_kept(shared: bool) -> None:
    """The second pass draws what the first drew, and what is drawn afterwards is what one pass leaves."""
    x, y, ids = batch(11)
    drawn = []
    models = [Model("info_nce", wrap, dropout=0.4, shared=shared).double() for wrap in
              (in_chunks_of(4), partial(Chunked, chunk_size=4))]  # fmt: skip
    for model in models:
        torch.manual_seed(1)
        loss = model(x, y, ids)
        after_forward = torch.rand(3)
        loss.backward()
        drawn.append(torch.cat((after_forward, torch.rand(3))))
    assert drawn[0].equal(drawn[1])
    assert_same_gradients(*models, 1e-12)


def test_random_state_of_a_device_is_kept() -> None:
    """With a counter in the place of a GPU's generator: each chunk begins where it did."""
    counter, seen = [0], []

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(counter[0])
            counter[0] += 1
            return x * self.weight

    with stub_gpu(backing="cpu"):
        generator = {
            "get_rng_state": lambda device: torch.tensor(counter[0]),
            "set_rng_state": lambda state, device: counter.__setitem__(0, int(state)),
        }
        with mock.patch.multiple(torch.cuda, **generator):
            features = CachedBackward(Draws(), chunk_size=2)(torch.randn(5, 3))
            counter[0] += 10
            features.sum().backward()
    assert seen == [0, 1, 2, 0, 1, 2] and counter == [13]


class _Live:
    """A saved tensor that counts how much of them is alive."""

    now = most = 0

    def __init__(self, x: Tensor) -> None:
        self.x = x
        _Live.now += x.numel()
        _Live.most = max(_Live.most, _Live.now)
        weakref.finalize(self, _Live._gone, x.numel())

    @classmethod
    def _gone(cls, count: int) -> None:
        cls.now -= count


def _most_saved(tower: nn.Module, x: Tensor) -> int:
    """How many numbers the graph of a step holds at most."""
    _Live.now = _Live.most = 0
    with torch.autograd.graph.saved_tensors_hooks(_Live, lambda live: live.x):
        tower(x).square().sum().backward()
    return _Live.most


def test_one_chunk_has_a_graph_at_a_time() -> None:
    tower = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
    x = torch.randn(64, 8)
    graph_of_4, parameters = _most_saved(tower, x[:4]), sum(p.numel() for p in tower.parameters())
    inputs_and_features = 2 * x.numel()
    allowed = graph_of_4 + parameters + inputs_and_features
    assert _most_saved(tower, x) > 3 * allowed, "else the next line says nothing"
    assert _most_saved(CachedBackward(tower, chunk_size=4), x) <= allowed


def test_a_kept_loss_keeps_no_inputs() -> None:
    for tower in (nn.Linear(6, D), CachedBackward(nn.Linear(6, D), chunk_size=4)):
        x = torch.randn(9, 6)
        inputs = weakref.ref(x)
        loss = tower(x).sum()
        loss.backward()
        del x
        assert inputs() is None and loss.grad_fn is not None


@pytest.mark.usefixtures("both_ways")
def test_no_graph_without_gradients() -> None:
    tower = CachedBackward(nn.Linear(6, D), chunk_size=4)
    x = torch.randn(9, 6)
    with torch.no_grad():
        assert not tower(x).requires_grad
    with torch.inference_mode():
        assert_close(tower(x), tower.tower(x), 1e-6)
    tower.requires_grad_(False)
    assert not tower(x).requires_grad


@pytest.mark.usefixtures("both_ways")
def test_one_frozen_tower() -> None:
    x, y, ids = batch(9)
    ours, theirs = Model("info_nce", in_chunks_of(4)).double(), Model("info_nce").double()
    for model in (ours, theirs):
        model.right.requires_grad_(False)
        model(x, y, ids).backward()
    assert not any(p.grad is not None for p in ours.right.parameters())
    for p, q in zip(ours.left.parameters(), theirs.left.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-12)


@pytest.mark.usefixtures("both_ways")
def test_an_empty_batch() -> None:
    model = Model("info_nce", in_chunks_of(4))
    loss = model(torch.ones(0, 6), torch.ones(0, 6), None)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.usefixtures("both_ways")
def test_hooks_of_parameters_run_once() -> None:
    tower = nn.Linear(6, D).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    tower(x).square().sum().backward()
    expected, calls = tower.weight.grad / 2, []
    tower.zero_grad()
    handle = tower.weight.register_hook(lambda grad: [calls.append(1), grad / 2][1])
    CachedBackward(tower, chunk_size=2)(x).square().sum().backward()
    assert_close(tower.weight.grad, expected, 1e-12)
    handle.remove()
    assert calls == [1] and not tower.weight._backward_hooks


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(D), nn.BatchNorm1d(D, momentum=None), nn.InstanceNorm1d(D, affine=True, track_running_stats=True)],
    ids=str,
)
def test_running_averages_move_once(norm: nn.Module) -> None:
    x = torch.randn(8, 6)
    tower = nn.Sequential(nn.Linear(6, D * 3), nn.Unflatten(1, (D, 3)), copy.deepcopy(norm))
    ours, theirs = CachedBackward(copy.deepcopy(tower), chunk_size=4), Chunked(tower, 4)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert p.equal(q)
    assert_same_gradients(ours, theirs, 2e-6)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("within", [False, True], ids=["backward after autocast", "backward within autocast"])
def test_autocast(within: bool) -> None:
    """Also beside a plain use of the same tower, which finds no weight rounded without a graph."""
    x, y, ids = batch(11, torch.float32)
    models = [Model("info_nce", in_chunks_of(4)), Model("info_nce", partial(Chunked, chunk_size=4))]
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            features = model.left(x)
            assert features.dtype == torch.bfloat16
            loss = model(x, y, ids) + model.left.tower(x).float().square().mean()
            if within:
                loss.backward()
        if not within:
            loss.backward()
    assert_same_gradients(*models, tolerance(torch.bfloat16))


def test_half_precision_gradients_are_summed_in_float32() -> None:
    tower = nn.Linear(1, 1, bias=False).bfloat16()
    CachedBackward(tower, chunk_size=1)(torch.ones(1000, 1, dtype=torch.bfloat16)).sum().backward()
    assert tower.weight.grad == 1000, "in bfloat16 256 + 1 is 256"


def test_a_scaler() -> None:
    x, y, ids = batch(9, torch.float32)
    models = Model("info_nce", in_chunks_of(4)), Model("info_nce")
    for model in models:
        scaler, step = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(x, y, ids)).backward()
        scaler.unscale_(step)
        scaler.step(step)
    assert_same_gradients(*models, 2e-6)


def test_checkpoints_and_parametrizations_within() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), weight_norm(nn.Linear(16, D)))

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layers, x, use_reentrant=False)

    x = torch.randn(9, 6, dtype=torch.float64)
    ours, theirs = Checkpointed().double(), Checkpointed().double()
    ours.load_state_dict(theirs.state_dict())
    for run in (CachedBackward(ours, chunk_size=4), theirs):
        run(x).square().sum().backward()
    assert_same_gradients(ours, theirs, 1e-12)


def test_compiled_and_traced() -> None:
    x = torch.randn(9, 6)
    plain = nn.Linear(6, D)
    plain(x).square().sum().backward()
    for make in (
        lambda tower: torch.compile(CachedBackward(tower, chunk_size=4), backend="eager"),
        lambda tower: CachedBackward(torch.compile(tower, backend="eager"), chunk_size=4),
        lambda tower: torch.fx.symbolic_trace(nn.Sequential(CachedBackward(tower, chunk_size=4))),
    ):
        tower = copy.deepcopy(plain)
        tower.zero_grad()
        make(tower)(x).square().sum().backward()
        assert_same_gradients(tower, plain, 2e-6)


#: (wrapper, loss, one tower for both sides).
IN_A_GROUP = (
    ("ddp", "info_nce", False), ("ddp", "sigmoid", True), ("ddp", "hinge", False), ("ddp", "all", True),
    ("ddp", "distillation", False), ("fsdp", "info_nce", False), ("fsdp", "hinge", True),
    ("fsdp outside", "all", False),
)  # fmt: skip


def _in_a_group(rank: int, seed: int) -> None:
    """DistributedDataParallel around the model, with uneven parts and numbers of chunks; fully_shard with even ones."""
    for wrapper, loss, shared in IN_A_GROUP:
        sizes = (5, 9) if wrapper == "ddp" else (5, 6)
        own = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        torch.manual_seed(seed)
        x, y, ids = batch(sum(sizes))
        theirs = Model(loss, shared=shared).double()
        ours = Model(loss, in_chunks_of(2), shared=shared, group=dist.group.WORLD).double()
        wrapped: nn.Module = ours
        if wrapper == "ddp":
            wrapped = DistributedDataParallel(ours)
        else:
            mesh = dist.init_device_mesh("cpu", (2,))
            towers = (ours.left.tower,) if shared else (ours.left.tower, ours.right.tower)
            layers = [layer for tower in towers for layer in (tower[0], tower[-1])]
            for part in (*layers, *towers, ours) if wrapper == "fsdp" else (ours.left, ours.right, ours):
                fully_shard(part, mesh=mesh)
        for _ in range(2):
            for model, given in ((theirs, (x, y, ids)), (wrapped, (x[own], y[own], ids[own]))):
                model.zero_grad()
                model(*given).backward()
            assert_same_gradients(ours, theirs, 1e-12)


def test_processes_get_the_whole_batchs_gradients() -> None:
    in_processes(2, _in_a_group, int(torch.randint(2**31, ())))


def test_it_is_found_in_the_package() -> None:
    assert gssf_triton.training.CachedBackward is CachedBackward
