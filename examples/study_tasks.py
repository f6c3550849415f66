"""The two kinds of task of most studies: two towers trained on pairs, and one tower that sees each class twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from glyph_model import ImageTower, TextTower
from study_data import Groups, Labelled, Pairs, jitter, take
from study_trainer import Column, Criterion, Settings, Task, folded
from torch import Tensor, nn

import gssf_triton

#: Rows a tower encodes at a time in evaluation.
CHUNK = 500


class FeatureTower(nn.Module):
    """(n, R, channels) region features to (n, dim), through their mean; `cells` gives the regions as they are."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, dim)

    def cells(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features, dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.head(self.cells(features).mean(1))
        return out


def image_tower(pairs: Pairs, settings: Settings) -> ImageTower | FeatureTower:
    """A tower for images given as bytes or as region features."""
    if pairs.images.dtype == "uint8":
        return ImageTower(settings.dim, settings.width)
    return FeatureTower(settings.dim, pairs.images.shape[-1])


def in_chunks(rows: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """`encode` of all rows, CHUNK at a time."""
    return torch.cat([encode(part) for part in torch.arange(rows).split(CHUNK)])


class PairTask(Task):
    """Image–text retrieval with one vector each."""

    def __init__(
        self, settings: Settings, column: Column, seed: int, train: Pairs, test: Pairs,
        texts: Callable[[], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(settings, seed)
        self.training_set, self.test_set = train, test
        self.image_groups, self.text_groups = Groups(train.image_ids), Groups(train.text_ids)
        self.images = image_tower(train, settings)
        self.texts = TextTower(settings.dim, 8 * settings.width) if texts is None else texts()
        for tower in (self.images, self.texts):
            tower.head.requires_grad_(not settings.fixed_heads)
        self.metric = column.metric(settings)
        self.criterion = Criterion(settings, self.metric)

    def draw(self) -> tuple[Tensor, Tensor]:
        """A batch of images and of tokens with distinct ids; `drawn` keeps their rows."""
        groups = torch.randperm(len(self.image_groups), generator=self.generator)[: self.settings.batch_size]
        (image_rows,) = self.image_groups.draw(groups, self.generator)
        (text_rows,) = self.text_groups.draw(groups, self.generator)
        self.drawn = image_rows, text_rows
        images = take(self.training_set.images, image_rows)
        if self.training_set.images.dtype == "uint8":
            images = jitter(images, self.generator)
        return images.to(self.device), self.training_set.tokens(text_rows).to(self.device)

    def loss(self, step: int) -> Tensor:
        images, tokens = self.draw()
        out: Tensor = self.criterion(self.images(images), self.texts(tokens), self.hardest(step))
        return out

    def encode(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """All images' and all texts' vectors."""
        images = in_chunks(len(pairs.images), lambda rows: self.images(take(pairs.images, rows).to(self.device)))
        texts = in_chunks(len(pairs.texts), lambda rows: self.texts(pairs.tokens(rows).to(self.device)))
        return images, texts

    def evaluate(self) -> dict[str, float]:
        images, texts = self.encode(self.test_set)
        return image_text_numbers(self, images, texts, self.test_set)


def image_text_numbers(task: PairTask, images: Tensor, texts: Tensor, pairs: Pairs) -> dict[str, float]:
    images, metric = folded(task.metric, images)
    return gssf_triton.metrics.image_text(
        images, texts, **metric,
        image_ids=torch.from_numpy(pairs.image_ids).to(images.device),
        text_ids=torch.from_numpy(pairs.text_ids).to(images.device),
    )  # fmt: skip


class LabelTask(Task):
    """Images of the same class or person: one tower, two different images of each class in a batch."""

    def __init__(self, settings: Settings, column: Column, seed: int, train: Labelled) -> None:
        super().__init__(settings, seed)
        self.training_set = train
        self.groups = Groups(train.ids)
        channels = 3 if train.images.ndim == 4 else 1
        self.tower = ImageTower(settings.dim, settings.width, channels)
        self.tower.head.requires_grad_(not settings.fixed_heads)
        self.metric = column.metric(settings)
        self.criterion = Criterion(settings, self.metric)

    def loss(self, step: int) -> Tensor:
        chosen = torch.randperm(len(self.groups), generator=self.generator)[: self.settings.batch_size]
        rows = torch.cat(self.groups.draw(chosen, self.generator, views=2))
        images = jitter(take(self.training_set.images, rows), self.generator)
        a, b = self.tower(images.to(self.device)).chunk(2)
        out: Tensor = self.criterion(a, b, self.hardest(step))
        return out

    def encode(self, part: Labelled) -> Tensor:
        return in_chunks(len(part.ids), lambda rows: self.tower(take(part.images, rows).to(self.device)))
