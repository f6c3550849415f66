"""What the goals are set for: the cells that say whether they are reached, and small ones that show that they run."""

from __future__ import annotations

from collections.abc import Callable

from _cells import PASSES, Cell, Shape, grid

_BOTH = PASSES[-1:]


def _square(N: int, D: int) -> Shape:
    return Shape(N, N, D, 32)


def _pairwise() -> list[Cell]:
    return grid("pairwise_sim", [_square(8192, 1024)], ("bf16",))


def _info_nce() -> list[Cell]:
    """32,768 pairs beside what stores S, a million alone."""
    stored = [_square(32_768, D) for D in (512, 1024)]
    cells = grid("info_nce", stored, ("bf16",), modes=_BOTH, compiled=stored[1:])
    return cells + grid("info_nce", [_square(1_048_576, 1024)], ("bf16",), modes=_BOTH, stored=False)


def _loss(name: str, N: int, D: int) -> Callable[[], list[Cell]]:
    return lambda: grid(name, [_square(N, D)], ("bf16",), modes=_BOTH)


def _late_interaction() -> list[Cell]:
    shapes = [Shape.of(1000, 1000, D, 32, R=36, L=32) for D in (128, 512, 1024)]
    return grid("late_interaction", shapes, ("bf16",), modes=PASSES[:1], compiled=shapes[::2])


def _topk() -> list[Cell]:
    shapes = [Shape.of(Q, N, 512, 32, k=10) for Q, N in ((64, 1_000_000), (10_000, 100_000))]
    return grid("topk", shapes, ("bf16",), modes=PASSES[:1])


def _small(name: str, modes: tuple[str, ...], **sizes: int) -> Callable[[], list[Cell]]:
    shape = Shape.of(*((3, 4) if name == "late_interaction" else (40, 40)), 64, 32, **sizes)
    return lambda: grid(name, [shape], ("fp32",), modes=modes, compiled=[])


#: Operation → kind of device → its cells of the suite "goals"; on a CPU the small ones.
GOALS: dict[str, dict[str, Callable[[], list[Cell]]]] = {
    "pairwise_sim": {"cuda": _pairwise, "cpu": _small("pairwise_sim", _BOTH)},
    "info_nce": {"cuda": _info_nce, "cpu": _small("info_nce", _BOTH)},
    "sigmoid_loss": {"cuda": _loss("sigmoid_loss", 65_536, 768), "cpu": _small("sigmoid_loss", _BOTH)},
    "triplet_loss": {"cuda": _loss("triplet_loss", 32_768, 1024), "cpu": _small("triplet_loss", _BOTH)},
    "late_interaction": {"cuda": _late_interaction, "cpu": _small("late_interaction", PASSES[:1], R=5, L=4)},
    "topk": {"cuda": _topk, "cpu": _small("topk", PASSES[:1], k=10)},
}
