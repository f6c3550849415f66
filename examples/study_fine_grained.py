"""Fine-grained retrieval, classes disjoint in training and test: letters of three alphabets, or CUB and SOP.

    python examples/study_fine_grained.py
    python examples/study_fine_grained.py --data cub --root ~/data --steps 5000 --width 64

Many letters differ in an accent, a hook or a stroke only. Recall@K and MAP@R (Musgrave et al., ECCV 2020), trained with
InfoNCE between two images of each class.
"""

from __future__ import annotations

import sys

import torch
from study_data import Labelled, Source, fine_grained_parts
from study_runner import REMEDIES, Study, main
from study_tasks import LabelTask
from study_trainer import Column, Settings, folded

import gssf_triton


class FineGrainedTask(LabelTask):
    """LabelTask tested within one set: every image a query against all others."""

    def __init__(self, settings: Settings, column: Column, seed: int, train: Labelled, test: Labelled) -> None:
        super().__init__(settings, column, seed, train)
        self.test_set = test

    def evaluate(self) -> dict[str, float]:
        embeddings = self.encode(self.test_set)
        queries, metric = folded(self.metric, embeddings)
        if queries is not embeddings:
            raise ValueError("normalize_after needs two sides, and this study's metric takes one: leave it out")
        labels = torch.from_numpy(self.test_set.ids).to(embeddings.device)
        return gssf_triton.metrics.retrieval(embeddings, labels, **metric, ks=(1, 2, 4, 8))


def make(settings: Settings, column: Column, seed: int, source: Source) -> FineGrainedTask:
    return FineGrainedTask(settings, column, seed, *fine_grained_parts(source, seed))


STUDY = Study(
    name="fine_grained",
    title="Fine-grained retrieval, disjoint classes",
    headline="map_at_r",
    headline_title="MAP@R (%)",
    shown=("r1", "r4", "map_at_r"),
    data=("glyphs", "cub", "sop"),
    settings=Settings(steps=100, loss="info_nce", learning_rate=1.6e-2, evaluations=1),
    held_out=400,
    columns=("cosine", "diag", "bdiag-32", "both-8", "both-32"),
    make=make,
    remedies=REMEDIES[:4],
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
