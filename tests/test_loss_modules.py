"""The life of a loss module: bounded scales, copies, averages and pickles, and calls that leave something behind."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.gloo import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import gssf_triton
from gssf_triton.losses.scales import bounded_exp
from gssf_triton.nn import GSSF, DistillationLoss, InfoNCELoss, SigmoidLoss, TripletLoss

D, N = 16, 8
SCALED: dict[str, tuple[Callable[..., Any], float]] = {
    "info_nce": (InfoNCELoss, 100.0),
    "sigmoid": (SigmoidLoss, 1000.0),
}
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "info_nce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
    "hinge": TripletLoss,
    "distillation": DistillationLoss,
}


def pair() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, N, D)
    return a, b


def arguments(loss: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return (a, b, a, b) if isinstance(loss, DistillationLoss) else (a, b)


def slope_at_bound(loss: Any, bound: float, a: Tensor, b: Tensor) -> float:
    """d loss / d log scale at the bound: a central difference in float64, from the formula."""
    S = nn.functional.normalize(a.double(), dim=1) @ nn.functional.normalize(b.double(), dim=1).T
    sign = 2 * torch.eye(N, dtype=torch.float64) - 1

    def value(scale: float) -> float:
        if isinstance(loss, SigmoidLoss):
            return -nn.functional.logsigmoid(sign * (scale * S - 10.0)).sum().item() / N
        target = torch.arange(N)
        both = nn.functional.cross_entropy(scale * S, target) + nn.functional.cross_entropy(scale * S.T, target)
        return both.item() / 2

    step = 1e-5
    return (value(bound * math.exp(step)) - value(bound * math.exp(-step))) / (2 * step)


@pytest.mark.parametrize("past", [0.0, 0.01, 3.0], ids=["at", "past", "far"])
@pytest.mark.parametrize("name", SCALED)
def test_a_scale_at_its_bound_has_the_gradient_of_the_bound(name: str, past: float) -> None:
    make, bound = SCALED[name]
    a, b = pair()  # strangers: a smaller scale lowers the loss
    loss = make(GSSF(D, 8), logit_scale=bound * math.exp(past))
    assert loss.logit_scale.item() == pytest.approx(bound, rel=1e-6) and loss.logit_scale <= bound
    loss(a, b).backward()
    wanted = slope_at_bound(loss, bound, a, b)
    assert wanted > 0 and loss.log_logit_scale.grad.item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", SCALED)
def test_training_leads_a_scale_back_from_past_its_bound(name: str) -> None:
    """Pushed outwards for long, then inwards: no drift to come back from."""
    make, bound = SCALED[name]
    loss = make(GSSF(D, 8), logit_scale=0.98 * bound)
    optimizer = torch.optim.Adam([loss.log_logit_scale], lr=0.01)

    def train(steps: int, direction: float) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (direction * loss.logit_scale).backward()
            optimizer.step()

    train(500, -1.0)
    assert loss.logit_scale == bound and loss.log_logit_scale.item() < math.log(bound) + 0.1
    train(60, 1.0)
    assert loss.logit_scale < 0.8 * bound


def test_bounded_exp() -> None:
    """Below the bound exp, at it its gradient both ways, past it inwards alone; so by torch.func, and twice."""
    log = torch.tensor([-2.0, 0.5, math.log(7.0), 2.5, 9.0, math.nan], dtype=torch.float64, requires_grad=True)
    value = bounded_exp(log, 7.0)
    bound = torch.tensor(7.0, dtype=torch.float64)
    assert torch.equal(value[:2], log[:2].exp()) and value[2:5].tolist() == pytest.approx([7.0] * 3)
    for sign, inwards in ((1.0, 7.0), (-1.0, 0.0)):
        (gradient,) = torch.autograd.grad((sign * bounded_exp(log, 7.0)).sum(), log)
        expected = torch.stack(
            (*(sign * log[:2].exp()), sign * bound, sign * inwards * bound / 7, sign * inwards * bound / 7)
        )
        torch.testing.assert_close(gradient[:5], expected)
        assert gradient[5].isnan()
        for transform in (torch.func.grad, torch.func.jacrev):
            torch.testing.assert_close(transform(lambda x, sign=sign: sign * bounded_exp(x, 7.0))(log[3]), expected[3])
    assert bounded_exp(torch.tensor([-math.inf, math.inf]), 7.0).tolist() == [0.0, 7.0]
    assert torch.autograd.gradgradcheck(lambda x: bounded_exp(x, 7.0), log[:2].detach().requires_grad_())
    slopes = torch.func.vmap(torch.func.grad(lambda x: bounded_exp(x, 7.0)))(log[:5].detach())
    torch.testing.assert_close(slopes, bounded_exp(log[:5], 7.0).detach())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert bounded_exp(torch.tensor(math.log(100.0), dtype=dtype), 100.0) <= 100


def test_a_bounded_scale_compiles() -> None:
    loss = InfoNCELoss(GSSF(D, 8), logit_scale=120.0)
    a, b = pair()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(a, b).backward()
    assert loss.log_logit_scale.grad.item() == pytest.approx(slope_at_bound(loss, 100.0, a, b), rel=1e-4)


def test_violations_outlive_every_kind_of_call() -> None:
    """Each call's own; transforms and export leave the last one's, and nothing that is theirs."""
    a, b = pair()
    loss = TripletLoss(GSSF(D, 8), margin=2.5)  # every negative violates it
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        loss.violations = torch.zeros(2, dtype=torch.int64)
        with mode():
            loss(a, b)
        assert copy.deepcopy(loss).violations.tolist() == [N, N]
    kept = loss.violations
    a, b = a[:3], b[:3]
    torch.func.vmap(lambda x: loss(x, b))(torch.stack((a, a)))
    torch.func.grad(lambda x: loss(x, b))(a)
    torch.func.grad(lambda p: torch.func.functional_call(loss, p, (a, b)))(dict(loss.named_parameters()))
    for strict in (False, True):
        exported = torch.export.export(loss, (a, b), strict=strict).module()
        torch.testing.assert_close(exported(a, b), loss(a, b))
        loss.violations = kept
    assert loss.violations is kept
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            compiled(a, b)
        assert loss.violations.tolist() == [3, 3] and loss.violations is not kept
        copy.deepcopy(loss)
    assert not dict(loss.named_buffers()) and "violations" not in loss.state_dict()


class Model(nn.Module):
    """A tower and a loss, as one module."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.tower, self.loss = nn.Linear(D, D), loss

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = self.loss(*arguments(self.loss, self.tower(a), self.tower(b)))
        return out


def _train_after_validation(rank: int) -> None:
    """A validation pass under inference mode, between two steps, changes neither."""
    a, b = pair()
    for name, make in LOSSES.items():
        found = []
        for mode in (None, torch.inference_mode, torch.no_grad):
            torch.manual_seed(3)
            model = DistributedDataParallel(Model(make(GSSF(D, 8), group=dist.group.WORLD)))
            for _ in range(2):
                model(a, b).backward()
                if mode is not None:
                    with mode():
                        model.module(a, b)
                        model(a, b)
            found.append([p.grad for p in model.parameters()])
        assert all(torch.equal(*x) for other in found[1:] for x in zip(found[0], other, strict=True)), name


def _copies(rank: int) -> None:
    """In the same process copies share the group, whatever makes them."""
    a, b = pair()
    some = dist.new_group([0, 1])
    for name, make in LOSSES.items():
        for group in (dist.group.WORLD, some, None):
            loss = make(GSSF(D, 8), group=group)
            expected = loss(*arguments(loss, a, b))
            average = AveragedModel(loss)
            average.update_parameters(loss)
            for other in (copy.deepcopy(loss), copy.copy(loss), average.module, copy.deepcopy([loss])[0]):
                assert other.group is group, name
                assert torch.equal(other(*arguments(loss, a, b)), expected), name
    # Not those of a deepcopy's own: parameters are copied.
    assert copy.deepcopy(loss).metric.W_diag is not loss.metric.W_diag


def _pickles(rank: int) -> None:
    """The group of all processes stays that; another is lost, and that is said."""
    a, b = pair()
    some = dist.new_group([0, 1])
    for name, make in LOSSES.items():
        for group in (dist.group.WORLD, None):
            loss = make(GSSF(D, 8), group=group)
            stored = io.BytesIO()
            torch.save(loss, stored)
            stored.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for other in (torch.load(stored, weights_only=False), pickle.loads(pickle.dumps(loss))):
                    assert other.group is group, name
                    assert torch.equal(other(*arguments(loss, a, b)), loss(*arguments(loss, a, b)))
        loss = make(GSSF(D, 8), group=some)
        with pytest.warns(UserWarning, match="process group of some processes, which cannot be saved") as said:
            other = pickle.loads(pickle.dumps(loss))
        assert other.group is None and len(said) == 1
        other.group = some
        assert torch.equal(other(*arguments(loss, a, b)), loss(*arguments(loss, a, b)))
    with pytest.raises(TypeError, match="group must be a torch"):
        TripletLoss(GSSF(D, 8), group="world")


def _life(rank: int) -> None:
    torch.manual_seed(rank)
    for part in (_copies, _pickles, _train_after_validation):
        part(rank)


def test_life_in_a_group() -> None:
    in_processes(2, _life)


def test_a_loss_of_all_processes_in_a_program_of_one() -> None:
    """Saved in a group, used where none was made: the process is all there is."""
    loss = TripletLoss(GSSF(D, 8))
    loss._group._all = True  # as it is loaded
    a, b = pair()
    assert loss.group is None and copy.deepcopy(loss).group is None
    expected = gssf_triton.triplet_loss(a, b, loss.metric.W_diag, loss.metric.W_blocks, normalize=True)
    assert torch.equal(loss(a, b), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_data(name: str) -> None:
    """Copied, pickled and saved whole, before and after calls, compiled ones too."""
    loss = LOSSES[name](GSSF(D, 8))
    given = arguments(loss, *pair())
    for call in (loss, torch.compile(loss, fullgraph=True, backend="eager")):
        with torch.inference_mode():
            call(*given)
        expected = loss(*given)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(other(*given), expected)
            for x, y in zip(other.parameters(), loss.parameters(), strict=True):
                assert torch.equal(x, y) and x is not y and x.requires_grad == y.requires_grad
