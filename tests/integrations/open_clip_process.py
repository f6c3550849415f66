"""What each of two processes does in test_open_clip, in a module that a fresh process can import."""

from __future__ import annotations

from pathlib import Path

import real_torchvision  # noqa: F401
import torch
from open_clip.loss import ClipLoss

from gssf_triton.integrations.open_clip import GSSFLoss
from gssf_triton.nn import GSSF


def half_of_a_batch(rank: int, dim: int, block: int, scale: float, folder: str) -> None:
    """Half of a batch in each of two processes; rank 0 writes loss and gradients, averaged over the processes."""
    data = torch.load(Path(folder) / "data.pt")
    size = len(data["images"])
    half = slice(rank * size // 2, (rank + 1) * size // 2)
    found = {}
    for local_loss in (True, False):
        metric = GSSF(dim, block)
        metric.load_state_dict(data["metric"])
        loss = ClipLoss(local_loss=local_loss, gather_with_grad=True, rank=rank, world_size=2)
        model = torch.nn.parallel.DistributedDataParallel(GSSFLoss(loss, metric))
        value = model(data["images"][half], data["texts"][half], torch.tensor(scale))
        value.backward()
        value = value.detach()
        torch.distributed.all_reduce(value)
        found[local_loss] = {"loss": value / 2, **{name: w.grad for name, w in metric.named_parameters()}}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
