"""Distillation: a small model learns a large one's similarities, with and without GSSF on the small one.

    python examples/study_distillation.py

The teacher (twice the channels, four times the width) is trained once a seed with InfoNCE and cosine. The student sees
no labels: its loss is the Kullback–Leibler divergence between its similarities of a batch and the teacher's, both ways.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict

import torch
from study_data import Pairs, Source, image_text_pairs
from study_runner import Study, main, shared_towers
from study_tasks import PairTask
from study_trainer import Column, Settings, finish, folded
from torch import Tensor

import gssf_triton
from gssf_triton.nn import InfoNCELoss

#: The teacher: twice the channels of the default student, four times its width.
TEACHER = Settings(dim=128, width=16, learning_rate=4e-3, loss="info_nce", evaluations=1)


@functools.lru_cache(maxsize=1)
def teacher_features(source: Source, seed: int) -> tuple[Pairs, Pairs, Tensor, Tensor, float]:
    """(train, test, the teacher's images, its texts, its logit scale), the teacher trained once a seed."""
    train, test = image_text_pairs(source, seed)
    settings = shared_towers(source, TEACHER)
    task = PairTask(settings, Column("cosine"), seed, train, test)
    identity = {"towers": "teacher", "data": source.data, "held_out": source.held_out, "limit": source.limit}
    identity |= {"seed": seed} | asdict(settings)
    name = f"teacher-{source.data}-{settings.dim}-{settings.width}-{seed}.pt"
    history = finish(task, identity, source.cache / "towers" / name)
    print(f"teacher, seed {seed}: rsum {history[-1]['rsum']:.1f}", file=sys.stderr)
    with torch.no_grad():
        images, texts = task.encode(train)
    assert isinstance(task.criterion.loss, InfoNCELoss)
    return train, test, images, texts, float(task.criterion.loss.logit_scale.detach())


class DistillationTask(PairTask):
    """PairTask whose loss compares with the teacher's similarities."""

    def __init__(self, settings: Settings, column: Column, seed: int, source: Source) -> None:
        train, test, self.teacher_images, self.teacher_texts, self.scale = teacher_features(source, seed)
        super().__init__(settings, column, seed, train, test)

    def loss(self, step: int) -> Tensor:
        images, tokens = self.draw()
        a, metric = folded(self.metric, self.images(images))
        b = self.texts(tokens)
        image_rows, text_rows = self.drawn
        teacher_a, teacher_b = self.teacher_images[image_rows].to(a), self.teacher_texts[text_rows].to(b)
        flipped = metric | {"W_blocks": None if metric["W_blocks"] is None else metric["W_blocks"].mT}
        there = gssf_triton.distillation_loss(
            a, b, **metric | {"normalize": True}, teacher_a=teacher_a, teacher_b=teacher_b, logit_scale=self.scale
        )
        back = gssf_triton.distillation_loss(
            b, a, **flipped | {"normalize": True}, teacher_a=teacher_b, teacher_b=teacher_a, logit_scale=self.scale
        )
        return (there + back) / 2


def make(settings: Settings, column: Column, seed: int, source: Source) -> DistillationTask:
    return DistillationTask(settings, column, seed, source)


STUDY = Study(
    name="distillation",
    title="Distillation into a small model",
    headline="rsum",
    headline_title="rsum (of 600)",
    shown=("i2t_r1", "t2i_r1", "rsum"),
    data=("glyphs", "f30k", "coco"),
    settings=Settings(steps=150, dim=64, width=4, learning_rate=8e-3, evaluations=3),
    columns=("cosine", "diag", "bdiag-16", "both-4", "both-16"),
    objective="distillation_loss",
    make=make,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
