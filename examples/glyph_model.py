"""Two small towers for the glyph–name set: a convolutional one for images, a recurrent one for names."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

#: Hash buckets of words and of their letter trigrams; unseen words are still known by their trigrams.
BUCKETS = 8192
MAX_WORDS = 12


def _pieces(word: str) -> list[int]:
    """Bucket numbers of a word and its letter trigrams; 0 is kept for padding."""
    padded = f"<{word}>"
    grams = [word, *(padded[i : i + 3] for i in range(len(padded) - 2))]
    return [1 + zlib.crc32(gram.encode()) % (BUCKETS - 1) for gram in grams]


def tokenize(names: Sequence[str]) -> Tensor:
    """Names as (n, MAX_WORDS, pieces) int64 bucket numbers, zero where there is nothing."""
    words = [[_pieces(word) for word in name.replace("-", " ").split()[:MAX_WORDS]] for name in names]
    longest = max(len(pieces) for name in words for pieces in name)
    tokens = np.zeros((len(words), MAX_WORDS, longest), dtype=np.int64)
    for i, name in enumerate(words):
        for j, pieces in enumerate(name):
            tokens[i, j, : len(pieces)] = pieces
    return torch.from_numpy(tokens)


class ImageTower(nn.Module):
    """(n, 32, 32) images in [0, 1] to (n, dim)."""

    def __init__(self, dim: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, dim))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images[:, None])
        return out


class TextTower(nn.Module):
    """(n, MAX_WORDS, pieces) tokens to (n, dim): pieces averaged to words, a bidirectional GRU over the words."""

    def __init__(self, dim: int, width: int = 128) -> None:
        super().__init__()
        self.pieces = nn.Embedding(BUCKETS, width, padding_idx=0)
        self.words = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        present = (tokens > 0).sum(-1, keepdim=True)
        words = self.pieces(tokens).sum(2) / present.clamp_min(1)
        states, _ = self.words(words)
        mask = present > 0
        pooled = states.masked_fill(~mask, -torch.inf).amax(1)
        out: Tensor = self.head(pooled)
        return out
