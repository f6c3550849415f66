"""Two small towers for the glyph–name set: a convolutional one for images, a recurrent one for names."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

#: Hash buckets of words and of their letter trigrams: an unseen word still has known trigrams.
BUCKETS = 8192
MAX_WORDS = 12


@functools.lru_cache(maxsize=65536)
def _pieces(word: str) -> list[int]:
    """Bucket numbers of a word and its letter trigrams; 0 is kept for padding."""
    padded = f"<{word}>"
    grams = [word, *(padded[i : i + 3] for i in range(len(padded) - 2))]
    return [1 + zlib.crc32(gram.encode()) % (BUCKETS - 1) for gram in grams]


def tokenize(names: Sequence[str], max_words: int = MAX_WORDS) -> Tensor:
    """Names as (n, max_words, pieces) int64 bucket numbers, padded with 0."""
    words = [[_pieces(word) for word in name.replace("-", " ").split()[:max_words]] for name in names]
    longest = max(len(pieces) for name in words for pieces in name)
    tokens = np.zeros((len(words), max_words, longest), dtype=np.int64)
    for i, name in enumerate(words):
        for j, pieces in enumerate(name):
            tokens[i, j, : len(pieces)] = pieces
    return torch.from_numpy(tokens)


class ImageTower(nn.Module):
    """(n, 32, 32), or (n, channels, H, W), images in [0, 1] to (n, dim); `cells` is the 4×4 grid before the head."""

    def __init__(self, dim: int, width: int = 32, channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(channels * 16, dim)

    def _grid(self, images: Tensor) -> Tensor:
        grid: Tensor = self.trunk(images[:, None] if images.dim() == 3 else images)
        return grid if grid.shape[-2:] == (4, 4) else nn.functional.adaptive_avg_pool2d(grid, 4)

    def cells(self, images: Tensor) -> Tensor:
        """(n, 16, 4 · width), the grid's cells as regions."""
        return self._grid(images).flatten(2).mT

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self._grid(images).flatten(1))
        return out


class WordEmbedding(nn.Module):
    """(n, words, pieces) tokens to words (n, words, width), the mean of their pieces, and a mask of the real ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pieces = nn.Embedding(BUCKETS, width, padding_idx=0)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        present = (tokens > 0).sum(-1, keepdim=True)
        return self.pieces(tokens).sum(2) / present.clamp_min(1), present[..., 0] > 0


class TextTower(nn.Module):
    """(n, words, pieces) tokens to (n, dim): a bidirectional GRU over the words, its maximum over them."""

    def __init__(self, dim: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = WordEmbedding(width)
        self.words = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, dim)

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The (n, words, 2 · width) states and the (n, words) mask of the real words."""
        words, mask = self.embedding(tokens)
        states, _ = self.words(words)
        return states, mask

    def forward(self, tokens: Tensor) -> Tensor:
        states, mask = self.states(tokens)
        out: Tensor = self.head(states.masked_fill(~mask[..., None], -torch.inf).amax(1))
        return out
