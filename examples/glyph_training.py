"""Train two towers under one metric, with checkpoints that resume to the same bits, and measure retrieval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import load_checkpoint, restoring, save_checkpoint
from glyph_model import ImageTower, TextTower, tokenize
from torch import Tensor, nn

from gssf_triton.data.glyphs import Glyphs
from gssf_triton.losses.scales import bounded_exp
from gssf_triton.nn import GSSF, DistillationLoss, InfoNCELoss, SigmoidLoss, TripletLoss

LOSSES = ("info_nce", "sigmoid", "triplet", "distillation")
METRICS = ("cosine", "diag", "bdiag", "both")
TITLES = {"cosine": "cosine", "diag": "Diag", "bdiag": "B-Diag", "both": "both"}
KS = (1, 5, 10)
#: The fields of a checkpoint.
STATE = ("identity", "model", "optimizer", "generator", "step", "history")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers, besides the metric and the seed."""

    steps: int = 320
    batch_size: int = 256
    dim: int = 256
    block_size: int = 32
    loss: str = "info_nce"
    learning_rate: float = 2e-3
    margin: float = 0.2
    #: Share of the steps in which the hinge uses all negatives: with the hardest alone, training may collapse at once.
    all_negatives: float = 0.2
    #: The checkpoint that distillation learns from.
    teacher: str = ""
    evaluations: int = 8
    held_out: int = 1000


class Retriever(nn.Module):
    """Towers and a loss, which holds the metric; `forward` gives the similarity matrix of images with names."""

    def __init__(self, metric: str, settings: Settings, teacher: Retriever | None = None) -> None:
        super().__init__()
        self.images = ImageTower(settings.dim)
        self.texts = TextTower(settings.dim)
        gssf = GSSF(settings.dim, settings.block_size, diag=metric != "bdiag", blocks=metric in ("bdiag", "both"))
        # Cosine is GSSF frozen at its start: every column runs the same code.
        gssf.requires_grad_(metric != "cosine")
        self.loss: nn.Module = {
            "info_nce": lambda: InfoNCELoss(gssf),
            "sigmoid": lambda: SigmoidLoss(gssf),
            "triplet": lambda: TripletLoss(gssf, margin=settings.margin),
            "distillation": lambda: DistillationLoss(gssf, None if teacher is None else teacher.metric),
        }[settings.loss]()

    @property
    def metric(self) -> GSSF:
        """The similarity that the loss trains."""
        assert isinstance(self.loss.metric, GSSF)
        return self.loss.metric

    def features(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(n, dim) of images and of names."""
        return self.images(images), self.texts(tokens)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        S: Tensor = self.metric(*self.features(images, tokens))
        return S


def load_teacher(checkpoint: str) -> Retriever:
    """A trained model of any metric, size and loss, frozen."""
    state = load_checkpoint(Path(checkpoint), ("identity", "model"))
    with restoring(Path(checkpoint)):
        identity = {name: value for name, value in state["identity"].items() if name != "seed"}
        metric = identity.pop("metric")
        # Any loss may have trained it: only towers and metric are used.
        model = Retriever(metric, Settings(**identity | {"loss": "info_nce"}))
        kept = {name: x for name, x in state["model"].items() if name.startswith(("images.", "texts.", "loss.metric."))}
        model.load_state_dict(kept, strict=False)
    return model.eval().requires_grad_(False)


def info_nce(S: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's loss of a matrix of scores: cross entropy of matching pairs, both directions.

    For scores that are no product, such as late interaction's; `gssf_triton.info_nce` needs no matrix.
    """
    logits = bounded_exp(log_scale, 100.0) * S
    target = torch.arange(len(S), device=S.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.mT, target)) / 2


class Sampler:
    """Batches of distinct names, so that every other pair of a batch is a negative, each in a random typeface."""

    def __init__(self, glyphs: Glyphs, batch_size: int, seed: int) -> None:
        order = np.argsort(glyphs.name_ids, kind="stable")
        counts = np.bincount(glyphs.name_ids, minlength=len(glyphs.names))
        self.order, self.counts = torch.from_numpy(order), torch.from_numpy(counts)
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)[:-1]]))
        self.images = torch.from_numpy(glyphs.images)
        self.tokens = tokenize(glyphs.names)
        self.batch_size = min(batch_size, len(glyphs.names))
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        names = torch.randperm(len(self.counts), generator=self.generator)[: self.batch_size]
        which = (torch.rand(len(names), generator=self.generator) * self.counts[names]).long()
        images = self.images[self.order[self.starts[names] + which]]
        # A shift of up to two pixels: a glyph's position carries no information.
        dy, dx = (int(torch.randint(-2, 3, (), generator=self.generator)) for _ in range(2))
        return torch.roll(images, (dy, dx), (1, 2)).float() / 255, self.tokens[names]


def test_pairs(test: Glyphs, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One image of each test name, in a typeface drawn once for all runs, and the names' tokens."""
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(np.flatnonzero(test.name_ids == i)) for i in range(len(test.names))]
    return torch.from_numpy(test.images[chosen]).float() / 255, tokenize(test.names)


def recalls(S: Tensor) -> dict[str, float]:
    """R@1, 5, 10 in percent, both ways, and their sum, where row i matches column i only.

    A tie counts against the match: otherwise a constant S would look perfect.
    """
    positive = S.diagonal()
    others = ~torch.eye(len(S), dtype=torch.bool, device=S.device)
    ranks = {
        "i2t": ((positive[:, None] <= S) & others).sum(1),
        "t2i": ((positive[None, :] <= S) & others).sum(0),
    }
    scores = {f"{way}_r{k}": 100 * (rank < k).double().mean().item() for way, rank in ranks.items() for k in KS}
    return scores | {"rsum": sum(scores.values())}


@torch.no_grad()
def similarities(model: Retriever, images: Tensor, tokens: Tensor) -> Tensor:
    """S of all test images with all test names, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    S: Tensor = model(images.to(device), tokens.to(device)).float().cpu()
    model.train()
    return S


class Run:
    """One column's training with one seed; resumes from `checkpoint` if that has the same settings."""

    def __init__(
        self, settings: Settings, metric: str, seed: int, train: Glyphs, pairs: tuple[Tensor, Tensor],
        device: torch.device, checkpoint: Path,
    ) -> None:  # fmt: skip
        self.settings, self.metric, self.seed, self.pairs = settings, metric, seed, pairs
        self.teacher = load_teacher(settings.teacher).to(device) if settings.teacher else None
        torch.manual_seed(seed)
        self.device, self.checkpoint = device, checkpoint
        self.model = Retriever(metric, settings, self.teacher).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
        self.sampler = Sampler(train, settings.batch_size, seed)
        self.step = 0
        self.history: list[dict[str, float]] = []
        if checkpoint.exists():
            self._resume(load_checkpoint(checkpoint, STATE))

    def _identity(self) -> dict[str, Any]:
        return asdict(self.settings) | {"metric": self.metric, "seed": self.seed}

    def _resume(self, state: dict[str, Any]) -> None:
        if state["identity"] != self._identity():
            changed = [k for k, v in self._identity().items() if state["identity"].get(k) != v]
            raise ValueError(
                f"{self.checkpoint} holds a run with other settings ({', '.join(changed)}): "
                "choose another --out, or start over with --fresh"
            )
        with restoring(self.checkpoint):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.sampler.generator.set_state(state["generator"])
        self.step, self.history = state["step"], state["history"]

    def save(self) -> None:
        save_checkpoint(
            self.checkpoint,
            {
                "identity": self._identity(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.sampler.generator.get_state(),
                "step": self.step,
                "history": self.history,
            },
        )

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The loss of one batch, at this step."""
        a, b = self.model.features(images, tokens)
        if isinstance(self.model.loss, TripletLoss):
            self.model.loss.hardest = self.step >= self.settings.all_negatives * self.settings.steps
        with torch.no_grad():
            taught = () if self.teacher is None else self.teacher.features(images, tokens)
        out: Tensor = self.model.loss(a, b, *taught)
        return out

    def train(self) -> Iterator[dict[str, float]]:
        """Train to the last step, yielding {"step", "loss"} each step; measures and saves as often as settings say."""
        settings = self.settings
        every = max(1, settings.steps // settings.evaluations)
        while self.step < settings.steps:
            # Warm up over a twentieth, then a half cosine down to zero.
            warm = min(1.0, (self.step + 1) / max(1, settings.steps // 20))
            for group in self.optimizer.param_groups:
                falling = 0.5 * (1 + math.cos(math.pi * self.step / settings.steps))
                group["lr"] = settings.learning_rate * warm * falling
            images, tokens = self.sampler.draw()
            loss = self.loss(images.to(self.device), tokens.to(self.device))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.step += 1
            measured = {"step": float(self.step), "loss": loss.item()}
            if isinstance(self.model.loss, TripletLoss):
                # A loss that stays at 2 · margin · batch, with every row and column violated, has collapsed.
                measured["violations"] = float(self.model.loss.violations.sum())
            if self.step % every == 0 or self.step == settings.steps:
                self.history.append(measured | recalls(similarities(self.model, *self.pairs)))
                self.save()
            yield measured
