"""A training script's data loading, run by test_concurrency.py as a process of its own: FOLDER.

The parent computes on several threads first, as any training script does before its next epoch's workers start.
"""

from __future__ import annotations

import pickle
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import gssf_triton
from gssf_triton.data import Glyphs, PrecomputedFeatures, load_precomputed


def make_glyphs() -> Glyphs:
    images, ids = np.random.default_rng(0).integers(0, 255, (8, 32, 32), np.uint8), np.arange(8)
    return Glyphs(images, ids, ids * 0, tuple("abcdefgh"), ("face",))


class Scored(Dataset[tuple[torch.Tensor, ...]]):
    """Similarities and a loss of an image's regions and a glyph's rows, computed where the item is read."""

    def __init__(self, features: PrecomputedFeatures, glyphs: Glyphs) -> None:
        self.features, self.glyphs = features, glyphs

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, ...]:
        regions = torch.from_numpy(np.array(self.features.images[item]))
        rows = torch.from_numpy(self.glyphs.images[item][:4].astype(np.float32)) / 255
        W_diag, W_blocks = torch.linspace(1, 2, 32), torch.linspace(-1, 1, 512).reshape(2, 16, 16)
        S = gssf_triton.pairwise_sim(regions, rows, W_diag, W_blocks, normalize=True)
        loss = gssf_triton.info_nce(rows, regions[:4], W_diag, W_blocks, logit_scale=5.0, normalize=True)
        found = gssf_triton.topk(regions, rows, W_diag, W_blocks, k=2)
        if get_worker_info() is not None:
            assert isinstance(self.features.images, np.memmap), "a worker was sent the features rather than their file"
            assert not torch.cuda.is_initialized()
        return S, loss, *found


def main(folder: str) -> None:
    torch.set_num_threads(2)
    x = torch.randn(1024, 256)
    gssf_triton.pairwise_sim(x, x, torch.ones(256)).exp().sum()
    dataset = Scored(load_precomputed(folder, "f30k", "dev"), make_glyphs())
    assert len(pickle.dumps(dataset.features)) < 2000
    # Sums in another order, as by other numbers of threads, are other bits: the workers have one.
    torch.set_num_threads(1)
    expected = [dataset[item] for item in range(len(dataset))]
    torch.set_num_threads(2)
    # A spawned worker imports everything anew: one will do.
    for method, epochs, workers in (("fork", 2, 2), ("spawn", 1, 1)):
        for epoch in range(epochs):
            loader = DataLoader(
                dataset, batch_size=None, num_workers=workers, multiprocessing_context=method, timeout=100
            )
            for found, wanted in zip(loader, expected, strict=True):
                same = (torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
                assert all(same), f"{method}, epoch {epoch}"
        print(f"{method}: the same bits", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
