"""The trainer that all studies share: columns, settings, the loss, a training loop that resumes to the same bits."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import load_checkpoint, restoring, save_checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gssf_triton.nn import GSSF, InfoNCELoss, TripletLoss

#: Which terms a column's metric has: (diagonal, blocks).
TERMS = {"cosine": (True, False), "diag": (True, False), "bdiag": (False, True), "both": (True, True)}
LOSSES = ("triplet", "info_nce")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers besides the column, the seed and the data.

    The loss's defaults are the recipe of VSE++ and SCAN: margin 0.2, batches of 128, all negatives before the hardest.

    Attributes:
        steps: Training steps.
        batch_size: Pairs a step.
        dim: Channels D of the similarity.
        width: Channels of the CNN's first layer; words have eight times as many.
        learning_rate: The towers' (AdamW, a short warm-up, half a cosine down to 0).
        loss: "triplet" (hinge) or "info_nce".
        margin: The hinge's margin.
        all_negatives: Share of the steps with all negatives, before the hinge takes the hardest.
        metric_rate: The metric's learning rate as a multiple of the towers'.
        metric_pull: Decoupled decay of the metric towards its start, the cosine, a step and unit of learning rate.
        metric_start: Standard deviation of noise on the metric's start (0: exactly the cosine).
        normalize_after: Fold first, then put both sides on the unit sphere; otherwise before, as `nn.GSSF` does.
        symmetric: Keep each block of the metric symmetric, so that s(x, y) = s(y, x).
        fixed_heads: Freeze the towers' last linear layers, so that only the metric can learn what they would.
        pooling: The pooling of regions and words, as in `gssf_triton.late_interaction`.
        evaluations: How often the test set is evaluated; the last one counts.
    """

    steps: int = 250
    batch_size: int = 128
    dim: int = 128
    width: int = 8
    learning_rate: float = 4e-3
    loss: str = "triplet"
    margin: float = 0.2
    all_negatives: float = 0.25
    metric_rate: float = 1.0
    metric_pull: float = 0.0
    metric_start: float = 0.0
    normalize_after: bool = False
    symmetric: bool = False
    fixed_heads: bool = False
    pooling: str = "max-mean"
    evaluations: int = 4


@dataclass(frozen=True)
class Column:
    """A column of a study's table, written `kind[-block size][:setting=value,…]`, e.g. "both-32:metric_rate=0.1".

    Attributes:
        kind: "cosine", "diag", "bdiag" or "both".
        block_size: B, for the kinds with blocks.
        changes: Settings that this column changes.
    """

    kind: str
    block_size: int = 0
    changes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Column:
        head, _, tail = text.partition(":")
        kind, _, size = head.partition("-")
        known = asdict(Settings())
        changes = tuple((key, value) for key, _, value in (part.partition("=") for part in tail.split(",") if part))
        for key, _ in changes:
            if key not in known:
                raise ValueError(f"column {text!r}: no setting is called {key!r}; there are {', '.join(known)}")
        if kind not in TERMS or (kind in ("bdiag", "both")) != size.isdecimal():
            raise ValueError(
                f"column {text!r}: expected cosine, diag, bdiag-B or both-B with a block size B, e.g. both-32"
            )
        return cls(kind, int(size or 0), changes)

    def __str__(self) -> str:
        head = self.kind + (f"-{self.block_size}" if self.block_size else "")
        return head + (":" if self.changes else "") + ",".join(f"{k}={v}" for k, v in self.changes)

    @property
    def title(self) -> str:
        names = {"cosine": "cosine", "diag": "Diag", "bdiag": "B-Diag", "both": "both"}
        title = names[self.kind] + (f", B = {self.block_size}" if self.block_size else "")
        return title + "".join(f", {key} {value}" for key, value in self.changes)

    def settings(self, common: Settings) -> Settings:
        """The common settings with this column's changes."""
        kinds = {key: type(value) for key, value in asdict(common).items()}
        changes: dict[str, Any] = {k: v == "True" if kinds[k] is bool else kinds[k](v) for k, v in self.changes}
        return replace(common, **changes)

    def metric(self, settings: Settings) -> GSSF:
        """The column's metric over `settings.dim` channels. Cosine is GSSF frozen at its start: the same code runs."""
        diag, blocks = TERMS[self.kind]
        made = NormalizedAfter if settings.normalize_after else GSSF
        metric = made(settings.dim, self.block_size or 1, diag=diag, blocks=blocks)
        # A separate generator, so that the towers start the same in every column.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in metric.parameters() if self.kind != "cosine" else ():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=settings.metric_start)
        if settings.symmetric and blocks:
            parametrize.register_parametrization(metric, "W_blocks", Symmetric())
        return metric.requires_grad_(self.kind != "cosine")


class Symmetric(nn.Module):
    """The symmetric part of every block."""

    def forward(self, W: Tensor) -> Tensor:
        return (W + W.mT) / 2


class NormalizedAfter(GSSF):
    """GSSF between T(a) / ‖T(a)‖ and b / ‖b‖: lengths never count.

    `fold` puts T(a) on the unit sphere; what is left is a plain cosine.
    """

    def fold(self, a: Tensor) -> Tensor:
        return nn.functional.normalize(self.transform(a), dim=-1)


def folded(metric: GSSF, a: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """a and the metric as the library's functions take them; already folded if the metric normalises afterwards."""
    if isinstance(metric, NormalizedAfter):
        return metric.fold(a), {"W_diag": torch.ones(a.shape[-1], device=a.device), "W_blocks": None, "normalize": True}
    return a, {"W_diag": metric.W_diag, "W_blocks": metric.W_blocks, "normalize": metric.normalize}


def hinge(S: Tensor, margin: float, hardest: bool) -> Tensor:
    """VSE++'s hinge on a given matrix of scores; `gssf_triton.triplet_loss` needs no matrix."""
    positive = S.diagonal()
    own = torch.eye(len(S), dtype=torch.bool, device=S.device)
    losses = [(margin + S - positive[:, None]).clamp_min(0), (margin + S.mT - positive[:, None]).clamp_min(0)]
    rows = [loss.masked_fill(own, 0) for loss in losses]
    return torch.stack([(row.amax(1) if hardest else row.sum(1)).sum() for row in rows]).sum()


class Task(nn.Module):
    """A model with its data, which a study defines. All randomness of its batches comes from `generator`."""

    def __init__(self, settings: Settings, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hardest(self, step: int) -> bool:
        """Whether the warm-up with all negatives is over."""
        return step >= self.settings.all_negatives * self.settings.steps

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of the next batch."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """The study's numbers on its test set, in percent."""


class Criterion(nn.Module):
    """The loss of matched rows under a metric, chosen by the settings."""

    def __init__(self, settings: Settings, metric: GSSF) -> None:
        super().__init__()
        if settings.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {settings.loss!r}")
        self.after = isinstance(metric, NormalizedAfter)
        # The metric is listed once among the parameters. After a fold the loss is plain cosine's.
        inner = GSSF(metric.dim, blocks=False).requires_grad_(False) if self.after else metric
        self.metric = metric
        self.loss: TripletLoss | InfoNCELoss
        self.loss = TripletLoss(inner, margin=settings.margin) if settings.loss == "triplet" else InfoNCELoss(inner)

    def forward(self, a: Tensor, b: Tensor, hardest: bool) -> Tensor:
        if isinstance(self.metric, NormalizedAfter):
            a = self.metric.fold(a)
        if isinstance(self.loss, TripletLoss):
            self.loss.hardest = hardest
        out: Tensor = self.loss(a, b)
        return out


#: The fields of a checkpoint.
STATE = ("identity", "model", "optimizer", "generator", "chance", "step", "history")


def is_of_metric(name: str) -> bool:
    """Whether a parameter, by its name, is a weight of the metric (a symmetric one's is its parametrization's)."""
    return not {"W_diag", "W_blocks"}.isdisjoint(name.split("."))


def optimizer(task: Task) -> torch.optim.Optimizer:
    """AdamW in two groups: the towers, and the metric's weights at their own rate and without weight decay."""
    settings = task.settings
    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    metric = [p for name, p in named if is_of_metric(name)]
    chosen = {id(p) for p in metric}
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named if id(p) not in chosen], "rate": 1.0, "weight_decay": 1e-4, "is_metric": False},
        {"params": metric, "rate": settings.metric_rate, "weight_decay": 0.0, "is_metric": True},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate)


def train(task: Task, identity: dict[str, Any], checkpoint: Path | None = None) -> Iterator[list[dict[str, float]]]:
    """Train to the last step, yielding the history of evaluations so far after each step.

    Resumes from `checkpoint`, to the same bits, if it has the same identity; it is written at every evaluation.

    Raises:
        ValueError: a checkpoint of another identity.
    """
    settings = task.settings
    opt = optimizer(task)
    starts = [[p.detach().clone() for p in group["params"]] for group in opt.param_groups]
    history: list[dict[str, float]] = []
    step = 0
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, STATE)
        # A setting that the file lacks was added later: its run used the default.
        held = asdict(Settings()) | state["identity"]
        if changed := [k for k, v in identity.items() if held.get(k) != v]:
            raise ValueError(
                f"{checkpoint} holds a run with other settings ({', '.join(changed)}): choose another --out, or start "
                "over with --fresh"
            )
        with restoring(checkpoint):
            task.load_state_dict(state["model"])
            opt.load_state_dict(state["optimizer"])
            task.generator.set_state(state["generator"])
            torch.set_rng_state(state["chance"])
        step, history = state["step"], state["history"]
    if step >= settings.steps:
        yield history
    every = max(1, settings.steps // max(1, settings.evaluations))
    while step < settings.steps:
        # Warm up over a twentieth, then half a cosine down to zero.
        rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.steps // 20))
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in opt.param_groups:
            group["lr"] = rate * group["rate"]
        task.train()
        loss = task.loss(step)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if settings.metric_pull:
            with torch.no_grad():
                for group, start in zip(opt.param_groups, starts, strict=True):
                    for weight, origin in zip(group["params"], start, strict=True):
                        weight.lerp_(origin, group["is_metric"] * min(1.0, group["lr"] * settings.metric_pull))
        step += 1
        if step % every == 0 or step == settings.steps:
            task.eval()
            with torch.no_grad():
                history.append({"step": float(step), "loss": loss.item()} | task.evaluate())
            if checkpoint is not None:
                save_checkpoint(
                    checkpoint,
                    {
                        "identity": identity,
                        "model": task.state_dict(),
                        "optimizer": opt.state_dict(),
                        "generator": task.generator.get_state(),
                        "chance": torch.get_rng_state(),
                        "step": step,
                        "history": history,
                    },
                )
        yield history


def finish(task: Task, identity: dict[str, Any], checkpoint: Path) -> list[dict[str, float]]:
    """Train a tower that columns share, or load its checkpoint; it is then frozen and in evaluation mode."""
    history: list[dict[str, float]] = []
    for reached in train(task, identity, checkpoint):
        history = reached
    task.eval().requires_grad_(False)
    return history
