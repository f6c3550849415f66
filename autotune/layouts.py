"""Triton's distributed layouts, read from TTGIR: how many neighbours of a tile a lane and a warp hold."""

from __future__ import annotations

import re
from ast import literal_eval
from dataclasses import dataclass
from typing import Any

_FIELD = re.compile(r"(\w+) = (\[\[.*?\]\]|\[[^\[\]]*\]|true|false|-?\d+)")
_PARENT = re.compile(r"parent = (#[\w.]+(?:<\{.*\}>)?)")

_Bits = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """What each bit of a register's and of a lane's number adds: (dimension, step). `fastest` as in Triton."""

    registers: _Bits
    lanes: _Bits
    fastest: int

    def vector(self, dim: int, extent: int) -> int:
        """Elements that one lane holds side by side along a dimension of this extent."""
        size = 1
        while size < extent and (dim, size) in self.registers:
            size *= 2
        return min(size, extent)

    def run(self, dim: int, extent: int) -> int:
        """Elements that a warp touches side by side in one instruction along a dimension of this extent."""
        size = self.vector(dim, extent)
        while size < extent and (dim, size) in self.lanes:
            size *= 2
        return min(size, extent)

    def without(self, dim: int) -> Layout:
        """The layout of a slice, which has lost a dimension."""
        registers, lanes = (
            tuple((d - (d > dim), step) for d, step in bits if d != dim) for bits in (self.registers, self.lanes)
        )
        return Layout(registers, lanes, self.fastest - (self.fastest > dim) if self.fastest != dim else 0)


def _bits(sizes: list[tuple[int, int]], taken: dict[int, int]) -> _Bits:
    """The bits of a number that counts through (dimension, size) pairs. `taken`: elements already covered."""
    bits = []
    for dim, size in sizes:
        for _ in range(size.bit_length() - 1):
            bits.append((dim, taken.setdefault(dim, 1)))
            taken[dim] *= 2
    return tuple(bits)


def _mfma(fields: dict[str, Any]) -> Layout:
    """AMD's accumulators: four neighbours a lane, along a row if transposed, else along a column."""
    along = 1 if fields["isTransposed"] else 0
    across = 4 if 16 in fields["instrShape"][:2] else 5
    lanes = [(1 - along, 1 << bit) for bit in range(across)] + [(along, 4 << bit) for bit in range(6 - across)]
    return Layout(((along, 1), (along, 2)), tuple(lanes), along)


def layout(text: str, names: dict[str, str]) -> Layout | None:
    """The layout of a TTGIR attribute; `names` resolves "#blocked". None for an unknown kind."""
    text = names.get(text, text)
    kind = text.partition("<")[0].removeprefix("#ttg.")
    fields = {key: literal_eval(value.title()) for key, value in _FIELD.findall(_PARENT.sub("", text))}
    if kind == "slice":
        parent = layout(_PARENT.findall(text)[0], names)
        return parent.without(fields["dim"]) if parent else None
    if kind == "blocked":
        order, taken = fields["order"], dict[int, int]()
        registers = _bits([(d, fields["sizePerThread"][d]) for d in order], taken)
        return Layout(registers, _bits([(d, fields["threadsPerWarp"][d]) for d in order], taken), order[0])
    if kind == "linear":
        registers, lanes = (
            tuple((d, step) for base in fields[key] for d, step in enumerate(base) if step)
            for key in ("register", "lane")
        )
        return Layout(registers, lanes, next((d for d, step in registers if step == 1), 0))
    if kind == "nvidia_mma":  # two neighbours of a row a lane, four lanes a row, eight rows
        return Layout(((1, 1), (0, 8)), ((1, 2), (1, 4), (0, 1), (0, 2), (0, 4)), 1)
    if kind == "amd_mfma":
        return _mfma(fields)
    if kind == "dot_op":  # neighbours along the summed dimension
        along = 1 - fields["opIdx"]
        return Layout(_bits([(along, fields.get("kWidth", 1))], {}), (), along)
    return None
