"""Image–text retrieval by late interaction: every word is compared with all regions, and the best count most.

    python examples/study_regions.py
    python examples/study_regions.py --data f30k --root ~/data

The regions of a glyph are the 16 cells of the CNN's last grid; those of Flickr30K and COCO come with them, and with
the recipe of SCAN (Lee et al., ECCV 2018): hinge of margin 0.2, batches of 128, the hardest negative after an epoch.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from glyph_model import ImageTower, TextTower
from glyph_training import info_nce
from study_data import Pairs, Source, image_text_pairs, take
from study_runner import REMEDIES, VSE_RECIPE, Study, main
from study_tasks import PairTask, in_chunks
from study_trainer import Column, Settings, folded, hinge
from torch import Tensor, nn

import gssf_triton


def score_numbers(S: Tensor, image_ids: Tensor, text_ids: Tensor) -> dict[str, float]:
    """R@1, 5, 10 both ways in percent, and their sum, from a matrix of scores; see `gssf_triton.metrics.image_text`."""
    match = image_ids[:, None] == text_ids
    numbers: dict[str, float] = {}
    for way, scores, right in (("i2t", S, match), ("t2i", S.mT, match.mT)):
        order = scores.argsort(dim=1, descending=True, stable=True)
        rank = right.gather(1, order).int().argmax(1)
        for k in (1, 5, 10):
            numbers[f"{way}_r{k}"] = 100 * (rank < k).double().mean().item()
    return numbers | {"rsum": sum(numbers.values())}


class RegionTask(PairTask):
    """PairTask whose towers give a vector a region and a word."""

    def __init__(self, settings: Settings, column: Column, seed: int, train: Pairs, test: Pairs) -> None:
        super().__init__(settings, column, seed, train, test)
        channels = 4 * settings.width if isinstance(self.images, ImageTower) else train.images.shape[-1]
        self.region_head = nn.Linear(channels, settings.dim)
        # Cells come out of a ReLU and share most of their direction. Without that part, scores separate sooner.
        self.region_norm = nn.BatchNorm1d(settings.dim)
        # A stroke's position matters, and a cell does not know its own.
        self.places = nn.Parameter(torch.zeros(16 if isinstance(self.images, ImageTower) else 1, channels))
        self.word_head = nn.Linear(16 * settings.width, settings.dim)
        for head in (self.region_head, self.word_head):
            head.requires_grad_(not settings.fixed_heads)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # Only PairTask's single vectors need it.
        del self.images.head, self.texts.head

    def regions(self, images: Tensor) -> Tensor:
        out: Tensor = self.region_head(self.images.cells(images) + self.places)
        return self.region_norm(out.mT).mT

    def words(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.texts, TextTower)
        states, mask = self.texts.states(tokens)
        return self.word_head(states), mask

    def scores(self, regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        regions, metric = folded(self.metric, regions)
        return gssf_triton.late_interaction(regions, words, **metric, word_mask=mask, pooling=self.settings.pooling)

    def loss(self, step: int) -> Tensor:
        images, tokens = self.draw()
        S = self.scores(self.regions(images), *self.words(tokens))
        if self.settings.loss == "info_nce":
            return info_nce(S, self.log_scale)
        return hinge(S, self.settings.margin, self.hardest(step))

    def evaluate(self) -> dict[str, float]:
        test = self.test_set
        tokens = test.tokens(torch.arange(len(test.texts))).to(self.device)
        words, mask = self.words(tokens)
        S = in_chunks(
            len(test.images),
            lambda rows: self.scores(self.regions(take(test.images, rows).to(self.device)), words, mask),
        )
        return score_numbers(S.cpu(), torch.from_numpy(test.image_ids), torch.from_numpy(test.text_ids))


def make(settings: Settings, column: Column, seed: int, source: Source) -> RegionTask:
    return RegionTask(settings, column, seed, *image_text_pairs(source, seed))


STUDY = Study(
    name="regions",
    title="Image–text retrieval, region–word late interaction",
    headline="rsum",
    headline_title="rsum (of 600)",
    shown=("i2t_r1", "t2i_r1", "rsum"),
    data=("glyphs", "f30k", "coco"),
    # The maximum trains one cell a word and step: training starts slowly, at a different time in each seed.
    settings=Settings(steps=300, loss="info_nce", dim=64, learning_rate=2e-2, pooling="lse-mean", evaluations=2),
    recipe=replace(VSE_RECIPE, pooling="lse-mean"),
    columns=("cosine", "diag", "bdiag-16", "both-4", "both-16"),
    make=make,
    held_out=500,
    remedies=REMEDIES[:3],
    # As in study_image_text.py.
    causes=tuple(f"{column}:fixed_heads=True" for column in ("cosine", "diag", "both-4", "both-16")),
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
