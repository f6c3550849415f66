"""A metric alone on frozen features: no tower trained, no gallery embedded again, a few seconds of training.

    python examples/study_frozen.py

Two towers learn with cosine from most scripts in sans-serif typefaces. Then they are frozen, and W_diag and W_blocks
alone are learned for other scripts in serif typefaces, and tested on names of those never seen. B = D is the metric
without structure. With --data f30k or coco: towers from train, metric from dev, test on test.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict, dataclass, replace

import torch
from study_data import Groups, Pairs, Source, transfer_pairs
from study_runner import Study, main, shared_towers
from study_tasks import PairTask
from study_trainer import Column, Criterion, Settings, Task, finish, folded
from torch import Tensor

import gssf_triton

#: The settings of the towers' training, which comes before the columns'.
TOWERS = Settings(steps=500, learning_rate=4e-3, loss="info_nce", evaluations=1)


@dataclass(frozen=True)
class Frozen:
    """One part's features and ids."""

    images: Tensor
    image_ids: Tensor
    texts: Tensor
    text_ids: Tensor


@functools.lru_cache(maxsize=1)
def frozen_features(source: Source, seed: int, dim: int, width: int) -> tuple[Frozen, Frozen]:
    """(the metric's training part, test) as the frozen towers see them; trained once a seed and kept in the cache."""
    base, train, test = transfer_pairs(source, seed)
    settings = shared_towers(source, replace(TOWERS, dim=dim, width=width))
    task = PairTask(settings, Column("cosine"), seed, base, test)
    identity = {"towers": "frozen", "data": source.data, "limit": source.limit, "seed": seed} | asdict(settings)
    finish(task, identity, source.cache / "towers" / f"frozen-{source.data}-{dim}-{width}-{seed}.pt")
    return _features(task, train), _features(task, test)


@torch.no_grad()
def _features(task: PairTask, pairs: Pairs) -> Frozen:
    images, texts = task.encode(pairs)
    return Frozen(images, torch.from_numpy(pairs.image_ids), texts, torch.from_numpy(pairs.text_ids))


class FrozenTask(Task):
    """Only the metric, and the loss's scale, learn."""

    def __init__(self, settings: Settings, column: Column, seed: int, train: Frozen, test: Frozen) -> None:
        super().__init__(settings, seed)
        self.training_set, self.test_set = train, test
        self.image_groups, self.text_groups = Groups(train.image_ids.numpy()), Groups(train.text_ids.numpy())
        self.metric = column.metric(settings)
        self.criterion = Criterion(settings, self.metric)

    def loss(self, step: int) -> Tensor:
        groups = torch.randperm(len(self.image_groups), generator=self.generator)[: self.settings.batch_size]
        (image_rows,) = self.image_groups.draw(groups, self.generator)
        (text_rows,) = self.text_groups.draw(groups, self.generator)
        a, b = self.training_set.images[image_rows], self.training_set.texts[text_rows]
        out: Tensor = self.criterion(a.to(self.device), b.to(self.device), self.hardest(step))
        return out

    def evaluate(self) -> dict[str, float]:
        test = self.test_set
        images, metric = folded(self.metric, test.images.to(self.device))
        image_ids, text_ids = test.image_ids.to(self.device), test.text_ids.to(self.device)
        return gssf_triton.metrics.image_text(
            images, test.texts.to(self.device), **metric, image_ids=image_ids, text_ids=text_ids
        )


def make(settings: Settings, column: Column, seed: int, source: Source) -> FrozenTask:
    return FrozenTask(settings, column, seed, *frozen_features(source, seed, settings.dim, settings.width))


STUDY = Study(
    name="frozen",
    title="A metric alone on frozen features",
    headline="rsum",
    headline_title="rsum (of 600)",
    shown=("i2t_r1", "t2i_r1", "rsum"),
    data=("glyphs", "f30k", "coco"),
    settings=Settings(steps=300, batch_size=256, width=16, loss="info_nce", learning_rate=6e-2, evaluations=4),
    columns=("cosine", "diag", "bdiag-32", "both-8", "both-32", "both-128"),
    make=make,
    held_out=500,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
