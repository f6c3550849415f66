"""The losses as modules that hold the metric and their own learned scalars; exported by `gssf_triton.nn`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn

from gssf_triton import checks
from gssf_triton.backend import CHOICES
from gssf_triton.losses.batch import check_reduction
from gssf_triton.losses.distillation import distillation_loss
from gssf_triton.losses.info_nce import MEMORY, info_nce
from gssf_triton.losses.scales import bounded_exp
from gssf_triton.losses.sigmoid import sigmoid_loss
from gssf_triton.losses.triplet import triplet_loss
from gssf_triton.processes import Held
from gssf_triton.tracing import Leaf

# One step each of what torch.fx traces.
for _name in ("bounded_exp", "distillation_loss", "info_nce", "sigmoid_loss", "triplet_loss"):
    torch.fx.wrap(_name)


class Metric(Protocol):
    """What a loss reads of its metric: `gssf_triton.nn.GSSF`, or anything with these attributes."""

    W_diag: nn.Parameter | None
    W_blocks: nn.Parameter | None
    normalize: bool


def check_metric_module(name: str, metric: object) -> None:
    """Something that has what `Metric` names."""
    missing = [part for part in ("W_diag", "W_blocks", "normalize") if not hasattr(metric, part)]
    if missing:
        raise TypeError(
            f"{name} must be a gssf_triton.nn.GSSF, or have its W_diag, W_blocks and normalize, "
            f"got {type(metric).__name__}"
        )


class _MetricLoss(Leaf):
    def __init__(self, metric: Metric, reduction: str, group: dist.ProcessGroup | None, backend: str) -> None:
        super().__init__()
        check_metric_module("metric", metric)
        check_reduction(reduction, group)
        checks.check_choice("backend", backend, CHOICES)
        self.metric = metric
        self.reduction = reduction
        self.group = group
        self.backend = backend

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that hold the batch; copies of the module have the same, see `gssf_triton.processes.Held`."""
        return self._group.get()

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        self._group = Held(group)

    def _loss(self, function: Callable[..., Any], *features: Tensor, **options: Any) -> Any:
        metric = self.metric
        return function(
            *features, W_diag=metric.W_diag, W_blocks=metric.W_blocks, normalize=metric.normalize,
            reduction=self.reduction, group=self.group, backend=self.backend, **options,
        )  # fmt: skip


class _ScaledLoss(_MetricLoss):
    """Holds the logarithm of logit_scale, as CLIP does, so that it stays positive; `max_logit_scale` bounds it.

    The bound is the value's: training leads the logarithm back from it and from past it, see `bounded_exp`.

    Learned scalars have shape (1,): torch's fully_shard takes no parameter without a dimension.
    """

    def __init__(
        self, metric: Metric, logit_scale: float, learn_scale: bool, max_logit_scale: float, **common: Any
    ) -> None:
        super().__init__(metric, **common)
        checks.check_positive("logit_scale", logit_scale)
        checks.check_positive("max_logit_scale", max_logit_scale, finite=False)
        checks.check_flags(learn_scale=learn_scale)
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(logit_scale)]), requires_grad=learn_scale)
        self.max_logit_scale = max_logit_scale

    @property
    def logit_scale(self) -> Tensor:
        """What the similarities are multiplied by, ()."""
        return bounded_exp(self.log_logit_scale, self.max_logit_scale).reshape(())


class InfoNCELoss(_ScaledLoss):
    """`gssf_triton.info_nce` with a metric and a learned logit_scale.

    Args:
        metric: A `gssf_triton.nn.GSSF`; its weights are this module's parameters too.
        logit_scale: Where the scale starts; CLIP's 1 / 0.07.
        learn_scale: Learn the scale.
        max_logit_scale: Bounds the scale, CLIP's 100: its value, so that one that starts or ends up at the bound, or
            past it, learns and comes back.
        symmetric: As in `info_nce`.
        label_smoothing: As in `info_nce`.
        memory: As in `info_nce`.
        reduction: As in `info_nce`.
        group: As in `info_nce`.
        backend: As in `info_nce`.

    Example:
        >>> import torch
        >>> from gssf_triton.nn import GSSF, InfoNCELoss
        >>> loss = InfoNCELoss(GSSF(dim=64, block_size=16))
        >>> loss(torch.randn(8, 64), torch.randn(8, 64)).shape
        torch.Size([])
    """

    #: Modules that were saved before there was a choice.
    memory: str = "least"

    def __init__(
        self,
        metric: Metric,
        *,
        logit_scale: float = 1 / 0.07,
        learn_scale: bool = True,
        max_logit_scale: float = 100.0,
        symmetric: bool = True,
        label_smoothing: float = 0.0,
        memory: str = "least",
        reduction: str = "mean",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        checks.check_flags(symmetric=symmetric)
        checks.check_fraction("label_smoothing", label_smoothing)
        checks.check_choice("memory", memory, MEMORY)
        common = {"reduction": reduction, "group": group, "backend": backend}
        super().__init__(metric, logit_scale, learn_scale, max_logit_scale, **common)
        self.symmetric = symmetric
        self.label_smoothing = label_smoothing
        self.memory = memory

    def forward(self, a: Tensor, b: Tensor, ids: Tensor | None = None) -> Tensor:
        """The loss of a (N, D) against b (N, D), b[i] matching a[i]."""
        return self._loss(
            info_nce, a, b, logit_scale=self.logit_scale, ids=ids, symmetric=self.symmetric,
            label_smoothing=self.label_smoothing, memory=self.memory,
        )  # fmt: skip


class SigmoidLoss(_ScaledLoss):
    """`gssf_triton.sigmoid_loss` with a metric and learned logit_scale and logit_bias.

    Args:
        metric: A `gssf_triton.nn.GSSF`.
        logit_scale: Where the scale starts; SigLIP's 10.
        logit_bias: Where the bias starts; SigLIP's −10.
        learn_scale: Learn both.
        max_logit_scale: Bound of the scale, as in `InfoNCELoss`.
        reduction: As in `sigmoid_loss`.
        group: As in `sigmoid_loss`.
        backend: As in `sigmoid_loss`.

    Example:
        >>> import torch
        >>> from gssf_triton.nn import GSSF, SigmoidLoss
        >>> loss = SigmoidLoss(GSSF(dim=64, block_size=16))
        >>> loss(torch.randn(8, 64), torch.randn(8, 64)).shape
        torch.Size([])
    """

    def __init__(
        self,
        metric: Metric,
        *,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        learn_scale: bool = True,
        max_logit_scale: float = 1000.0,
        reduction: str = "mean",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        checks.check_number("logit_bias", logit_bias)
        common = {"reduction": reduction, "group": group, "backend": backend}
        super().__init__(metric, logit_scale, learn_scale, max_logit_scale, **common)
        self.logit_bias = nn.Parameter(torch.tensor([float(logit_bias)]), requires_grad=learn_scale)

    def forward(self, a: Tensor, b: Tensor, ids: Tensor | None = None) -> Tensor:
        """The loss of a (N, D) against b (N, D), b[i] matching a[i]."""
        return self._loss(sigmoid_loss, a, b, logit_scale=self.logit_scale, logit_bias=self.logit_bias, ids=ids)


class TripletLoss(_MetricLoss):
    """`gssf_triton.triplet_loss` with a metric.

    `hardest` is a plain attribute: start with False and set it to True after the warm-up epochs. A compiled module
    compiles each once, when it is first met; run a step of both beforehand and the switch compiles nothing.

    Args:
        metric: A `gssf_triton.nn.GSSF`.
        margin: As in `triplet_loss`.
        hardest: As in `triplet_loss`.
        reduction: As in `triplet_loss`.
        group: As in `triplet_loss`.
        backend: As in `triplet_loss`.

    Attributes:
        violations: (2,) int64, how many negatives violated the margin in the last call: rows, columns. Not in the
            state dict, and no buffer: it lies where the last call's features did. Calls under `torch.func`'s transforms
            and `torch.export` leave it as it is.

    Example:
        >>> import torch
        >>> from gssf_triton.nn import GSSF, TripletLoss
        >>> loss = TripletLoss(GSSF(dim=64, block_size=16), hardest=False)
        >>> loss(torch.randn(8, 64), torch.randn(8, 64)).shape
        torch.Size([])
        >>> loss.violations.shape
        torch.Size([2])
    """

    violations: Tensor

    def __init__(
        self,
        metric: Metric,
        *,
        margin: float = 0.2,
        hardest: bool = True,
        reduction: str = "sum",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(metric, reduction, group, backend)
        checks.check_number("margin", margin)
        checks.check_flags(hardest=hardest)
        self.margin = margin
        self.hardest = hardest
        # No buffer: DistributedDataParallel writes into those, which it may not where the last call was made under
        # inference_mode.
        self.violations = torch.zeros(2, dtype=torch.int64)

    def forward(self, a: Tensor, b: Tensor, ids: Tensor | None = None) -> Tensor:
        """The loss of a (N, D) against b (N, D), b[i] matching a[i]."""
        loss, violations = self._loss(
            triplet_loss, a, b, margin=self.margin, hardest=self.hardest, ids=ids, return_violations=True
        )
        # A transform's tensors end with it, and an exported or traced graph has no module to remember them.
        forgets = torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()
        if isinstance(violations, Tensor) and not forgets:
            self.violations = violations
        return loss


class DistillationLoss(_MetricLoss):
    """`gssf_triton.distillation_loss` with the student's metric and, if it has one, the teacher's.

    Args:
        metric: The student's `gssf_triton.nn.GSSF`.
        teacher: The teacher's `gssf_triton.nn.GSSF`, or None for plain dot products. It gets no gradient: freeze it
            (`teacher.requires_grad_(False)`) before DistributedDataParallel counts the parameters that must have one.
        logit_scale: Multiplies both similarities.
        reduction: As in `distillation_loss`.
        group: As in `distillation_loss`.
        backend: As in `distillation_loss`.

    Example:
        >>> import torch
        >>> from gssf_triton.nn import GSSF, DistillationLoss
        >>> loss = DistillationLoss(GSSF(dim=64, block_size=16), logit_scale=20.0)
        >>> loss(torch.randn(8, 64), torch.randn(9, 64), torch.randn(8, 32), torch.randn(9, 32)).shape
        torch.Size([])
    """

    def __init__(
        self,
        metric: Metric,
        teacher: Metric | None = None,
        *,
        logit_scale: float = 1 / 0.07,
        reduction: str = "mean",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(metric, reduction, group, backend)
        if teacher is not None:
            check_metric_module("teacher", teacher)
        checks.check_positive("logit_scale", logit_scale)
        self.teacher = teacher
        self.logit_scale = logit_scale

    def forward(self, a: Tensor, b: Tensor, teacher_a: Tensor, teacher_b: Tensor) -> Tensor:
        """The loss of the student's a (M, D), b (N, D) given the teacher's (M, E), (N, E)."""
        teacher: dict[str, Tensor | None] = {"teacher_a": teacher_a, "teacher_b": teacher_b}
        if self.teacher is not None:
            teacher |= {"teacher_W_diag": self.teacher.W_diag, "teacher_W_blocks": self.teacher.W_blocks}
        return self._loss(distillation_loss, a, b, logit_scale=self.logit_scale, **teacher)
