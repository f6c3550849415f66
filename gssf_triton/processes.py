"""The processes of a `torch.distributed` group: whether they all make the same call, and what they hold together."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

#: Lengths that a call may tell the other processes; more than any has.
SIZES = 4
#: Bytes of the digest of a call's description.
DIGEST = 16


def gather_alike(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x of every process, of the same shape and dtype on all of them: (count, …). Not differentiable."""
    count = dist.get_world_size(group)
    together = x.new_empty(count * x.numel())
    # torch 2.13 gave it a new name, and warns at every call by the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(together, x.detach().reshape(-1), group=group)
    return together.view(count, *x.shape)


def kind(x: Tensor | None) -> tuple[object, ...] | None:
    """Dtype and shape, which all processes must have alike; None of no tensor."""
    return None if x is None else (x.dtype, *x.shape)


def _spoken(value: object) -> object:
    """1 and 1.0 are the same number. A tensor's value is not read: that would wait for the device."""
    if isinstance(value, Tensor):
        return "tensor"
    return int(value) if isinstance(value, float) and value.is_integer() else value


def agree(
    group: dist.ProcessGroup, sizes: tuple[int, ...], device: torch.device, call: Mapping[str, object]
) -> list[list[int]]:
    """The `sizes` of every process, in their order; `call`, its name first, is what all of them must do alike.

    One collective and one wait for the device. It has the same shape whatever is called, so that calls of different
    functions meet in it: the descriptions themselves travel only where their digests differ.

    Raises:
        ValueError: on every process alike, where their calls differ.
    """
    assert len(sizes) <= SIZES
    said = "\n".join(f"{name} = {_spoken(value)}" for name, value in {**call, "sizes": len(sizes)}.items()).encode()
    digest = hashlib.blake2b(said, digest_size=DIGEST).digest()
    mine = torch.tensor([*sizes, *(0,) * (SIZES - len(sizes)), len(said), *digest], device=device)
    rows = gather_alike(mine, group).tolist()
    if any(row[SIZES:] != rows[0][SIZES:] for row in rows):
        longest = max(row[SIZES] for row in rows)
        texts = gather_alike(torch.tensor([*said.ljust(longest)], device=device), group).tolist()
        raise ValueError(_difference([bytes(text).decode().rstrip().split("\n") for text in texts]))
    return [row[: len(sizes)] for row in rows]


def _difference(calls: list[list[str]]) -> str:
    """What is called by each process, and how, as far as they differ."""
    same = set.intersection(*map(set, calls))
    said = (", ".join([name, *(fact for fact in facts if fact not in same)]) for name, *facts in calls)
    return "every process of the group must make the same call, got " + "; ".join(
        f"rank {rank}: {text}" for rank, text in enumerate(said)
    )


class Held:
    """A module's process group. Copies of the module share it.

    Pickled, the group of all processes becomes that of the program that loads it, or None in a process without
    `init_process_group`. Any other group becomes None, with a warning.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._all = group is not None and group is dist.group.WORLD

    def get(self) -> dist.ProcessGroup | None:
        if self._all and dist.is_available():
            return dist.group.WORLD
        return self._group

    def __copy__(self) -> Held:
        return self

    def __deepcopy__(self, memo: object) -> Held:
        return self

    def __reduce__(self) -> tuple[Callable[[bool, bool], Held], tuple[bool, bool]]:
        return _loaded, (self._all, self._group is not None)


def _loaded(everyone: bool, some: bool) -> Held:
    held = Held(None)
    held._all = everyone
    if some and not everyone:
        warnings.warn(
            "a loss was saved with a process group of some processes, which cannot be saved: its group is None, and "
            "its loss this process's alone, until `group` is set",
            stacklevel=2,
        )
    return held
