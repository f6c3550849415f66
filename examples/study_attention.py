"""Attention: a small transformer as text tower, with dot products or GSSF similarities as attention scores.

    python examples/study_attention.py

The similarity between the towers is cosine in every column; what differs is the metric inside the attention, one for
each head, which starts as the identity: `nn.GSSFAttention` beside `nn.MultiheadAttention`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from glyph_model import WordEmbedding
from study_data import Source, image_text_pairs
from study_runner import REMEDIES, VSE_RECIPE, Study, main
from study_tasks import PairTask
from study_trainer import TERMS, Column, Settings
from torch import Tensor, nn

from gssf_triton.nn import GSSFAttention

HEADS, LAYERS, LONGEST = 4, 2, 64


def attention(column: Column, width: int) -> nn.MultiheadAttention:
    """The column's attention: the cosine column's is PyTorch's own."""
    if column.kind == "cosine":
        return nn.MultiheadAttention(width, HEADS, batch_first=True)
    diag, blocks = TERMS[column.kind]
    return GSSFAttention(width, HEADS, batch_first=True, block_size=column.block_size or None, diag=diag, blocks=blocks)


class Layer(nn.Module):
    """A transformer layer that normalises first."""

    def __init__(self, column: Column, width: int) -> None:
        super().__init__()
        self.attention = attention(column, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, absent: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, key_padding_mask=absent, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


class TransformerTower(nn.Module):
    """(n, words, pieces) tokens to (n, dim)."""

    def __init__(self, dim: int, width: int, column: Column) -> None:
        super().__init__()
        self.embedding = WordEmbedding(width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.layers = nn.ModuleList([Layer(column, width) for _ in range(LAYERS)])
        self.head = nn.Linear(width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask = self.embedding(tokens)
        x = x + self.places[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, ~mask)
        out: Tensor = self.head(x.masked_fill(~mask[..., None], -torch.inf).amax(1))
        return out


def make(settings: Settings, column: Column, seed: int, source: Source) -> PairTask:
    def texts() -> nn.Module:
        return TransformerTower(settings.dim, 8 * settings.width, column)

    return PairTask(settings, Column("cosine"), seed, *image_text_pairs(source, seed), texts)


STUDY = Study(
    name="attention",
    title="Attention in the text encoder",
    headline="rsum",
    headline_title="rsum (of 600)",
    shown=("i2t_r1", "t2i_r1", "rsum"),
    data=("glyphs", "f30k", "coco"),
    settings=Settings(steps=150, loss="info_nce", evaluations=3),
    columns=("cosine", "diag", "bdiag-16", "both-4", "both-16"),
    recipe=replace(VSE_RECIPE, loss="info_nce"),
    make=make,
    remedies=REMEDIES[:3],
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
