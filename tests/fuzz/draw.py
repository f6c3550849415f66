"""What every case draws from: sizes, values, dtypes, memory layouts. One seed in, the same case out."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gssf_triton.backend import HAS_TRITON

T = TypeVar("T")

#: Where the tensors of a case lie: the GPU, unless the kernels run in the interpreter.
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" and torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
#: One, primes, tiles and just past them.
SIZES = (1, 2, 3, 5, 7, 11, 13, 16, 17, 23, 31, 32, 33, 37, 47, 63, 64, 65, 97, 127, 128, 129)
BLOCKS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64)
#: Powers of ten on features. float16 has no room: what T(x) rounds away below 6e-5 is gone, as in torch.
SCALES = {torch.float16: (-1, 1), torch.bfloat16: (-9, 9), torch.float32: (-9, 9), torch.float64: (-60, 60)}


class Draw:
    """Random choices from one seed; `tags` collects the features of the case for the report."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.tags: set[str] = set()
        #: What autocast casts features to, where the case is one of autocast.
        self.autocast = torch.bfloat16
        # A share of the cases only: the interpreter is thousands of times slower.
        self.backend = "triton" if self.maybe(0.2) and HAS_TRITON else "torch"
        # How a user asks for it: on a CPU "auto" is torch.
        self.asked = "auto" if self.backend == "torch" and DEVICE == "cpu" and self.maybe(0.3, "auto") else self.backend
        self.dtype = self.choice((torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16))
        self.tag(str(self.dtype).removeprefix("torch."))

    @property
    def small(self) -> bool:
        return self.backend == "triton"

    def tag(self, *names: str) -> None:
        self.tags.update(names)

    def maybe(self, probability: float, tag: str | None = None) -> bool:
        hit = self.random.random() < probability
        if hit and tag is not None:
            self.tag(tag)
        return hit

    def choice(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    # ------------------------------------------------------------ sizes

    def size(self, most: int = 130, empty: float = 0.03) -> int:
        """A number of rows."""
        if self.maybe(empty, "empty"):
            return 0
        return self.choice([n for n in SIZES if n <= most])

    def channels(self, most: int = 200) -> tuple[int, int]:
        """(G, B): D = G·B, often no power of two; sometimes one block is all of D."""
        if self.small:
            most = min(most, 72)
        B = self.choice([n for n in BLOCKS if n <= most])
        G = 1 if self.maybe(0.15, "B = D") else self.random.randint(1, max(1, most // B))
        return G, B

    def kind(self) -> str:
        return self.choice(("diag", "blocks", "diag+blocks", "diag+blocks"))

    # ------------------------------------------------------------ values

    def scale(self, dtype: torch.dtype | None = None) -> float:
        """Of a whole tensor: 1, or tiny, or huge."""
        if not self.maybe(0.25, "scale"):
            return 1.0
        low, high = SCALES[dtype or self.dtype]
        return 10.0 ** self.random.uniform(low, high)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(DEVICE, dtype or self.dtype)

    def whole(self, *shape: int, most: int = 2, dtype: torch.dtype | None = None) -> Tensor:
        """Small whole numbers: sums of their products are exact in every dtype, and many are equal."""
        return torch.randint(-most, most + 1, shape, generator=self.generator).to(DEVICE, dtype or self.dtype)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """(count,) in any integer dtype that a user may have them in."""
        dtype = self.choice((torch.int64, torch.int64, torch.int32, torch.int16, torch.int8))
        return self.lay(torch.randint(low, high, (count,), generator=self.generator).to(DEVICE, dtype))

    def flags(self, *shape: int, share: float = 0.7) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < share).to(DEVICE)

    def rows(self, *shape: int, scale: float = 1.0, poison: float = 0.0, zeros: bool = True) -> Tensor:
        """Features in the case's dtype and in any layout; sometimes with denormals, a row of zeros, or NaN or Inf."""
        x = self.normal(*shape, scale=scale)
        if x.numel():
            row = x.view(-1, x.shape[-1])[self.random.randrange(x.numel() // x.shape[-1])]
            # Of a kernel not a row that is all there is: normalised, what it takes for 0 would be the whole result.
            if self.maybe(0.05, "denormal") and not (self.small and x.numel() == x.shape[-1]):
                row[:: 2 - zeros * self.choice((0, 1))] = torch.finfo(self.dtype).smallest_normal / 8
            elif zeros and self.maybe(0.05, "zero row"):
                row.zero_()
            elif self.maybe(poison, "not finite"):
                value = self.choice((math.nan, math.inf, -math.inf))
                row[self.random.randrange(x.shape[-1])] = value
                self.tag("NaN" if math.isnan(value) else "infinity")
        return self.lay(x)

    def weights(
        self, kind: str, G: int, B: int, *, dtype: torch.dtype | None = None, scale: float = 1.0
    ) -> dict[str, Tensor | None]:
        """Neither symmetric nor near the identity; float32 often beside half precision, float64 at times."""
        if dtype is None:
            dtype = self.dtype
            if dtype in HALVES and self.maybe(0.6, "float32 weights"):
                dtype = torch.float32
            elif self.maybe(0.03, "weights of another dtype"):
                dtype = self.choice((torch.float64, torch.bfloat16))
        # W_diag around 1, but no entry near 0 on its own account.
        diag = 1 + torch.randn(G * B, generator=self.generator, dtype=torch.float64)
        blocks = torch.randn(G, B, B, generator=self.generator, dtype=torch.float64) / max(B, 1) ** 0.5
        if B > 1 and self.maybe(0.1, "transposed weight"):
            blocks_laid = (scale * blocks).to(DEVICE, dtype).mT.contiguous().mT
        else:
            blocks_laid = self.lay((scale * blocks).to(DEVICE, dtype))
        return {
            "W_diag": self.lay((scale * diag).to(DEVICE, dtype)) if "diag" in kind else None,
            "W_blocks": blocks_laid if "blocks" in kind else None,
        }

    # ------------------------------------------------------------ memory

    def lay(self, x: Tensor) -> Tensor:
        """The same values in another layout; what lies between them, where they do not fill their storage, is NaN."""
        if x.dim() == 0 or not self.maybe(0.45):
            return x.contiguous()
        kind = self.choice(("transposed", "stepped", "offset", "padded", "narrowed"))
        self.tag(kind)
        if kind == "transposed":
            order = list(range(x.dim()))
            self.random.shuffle(order)
            inverse = [order.index(d) for d in range(x.dim())]
            return x.permute(order).contiguous().permute(inverse)
        junk = float("nan") if x.dtype.is_floating_point else 1
        if kind == "offset":
            # Storage that starts off the 16 bytes that wide loads want.
            by = self.choice((1, 3, 5))
            held = torch.full((x.numel() + by,), junk, dtype=x.dtype, device=x.device)
            return held[by:].copy_(x.reshape(-1)).view(x.shape)
        dim = self.random.randrange(x.dim())
        shape = list(x.shape)
        if kind == "stepped":
            step = self.choice((2, 3))
            shape[dim] = shape[dim] * step
            view = torch.full(shape, junk, dtype=x.dtype, device=x.device)[
                (slice(None),) * dim + (slice(None, None, step),)
            ]
        else:
            extra = 1 if kind == "padded" else self.choice((2, 5, 16))
            start = 0 if kind == "padded" else self.random.randint(1, extra)
            shape[dim] += extra
            view = torch.full(shape, junk, dtype=x.dtype, device=x.device).narrow(dim, start, x.shape[dim])
        return view.copy_(x)

    def expanded(self, x: Tensor, dim: int) -> Tensor:
        """x with one entry along `dim` in the place of all: stride 0."""
        self.tag("expanded")
        return x.narrow(dim, 0, 1).expand(x.shape)
