"""A differentiable call beside its float64 oracle: values, gradients, and everything a call must leave alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from support.reference import assert_close, tolerance
from support.region_word_reference import TIMES_THE_LOOPS_ERROR
from torch import Tensor

from fuzz.draw import DEVICE, HALVES
from fuzz.rounding import moves

Tensors = dict[str, Tensor | None]
Outputs = tuple[Tensor, ...]

MODES = ("grad", "no_grad", "inference", "autocast")


def always(tensors: Tensors) -> bool:
    return True


@dataclass
class Case:
    """One call. `call` and `oracle` take the tensors by name, the oracle in float64, and return a tuple.

    `out_dtypes` are those wanted of the outputs; `autocast` is what autocast multiplies in, and `cast` names the
    tensors that it rounds first; `incoming` are the gradients that flow in, one an output, None for one nobody uses.
    `decided(tensors)` is False where a maximum or a hinge is so near a tie that rounding decides it: then the gradient
    has no right value. Where a NaN makes more
    of the oracle's gradients NaN than it should (0 · NaN in a product), `dense_gradients` is False, and
    `dense_outputs` where an infinity makes more of its outputs NaN.
    `chain` is set where whole layers of torch's round to half precision too, where the contract's table is for one
    function: then the oracle itself, run in that dtype, says what torch is off by, and `TIMES_THE_LOOPS_ERROR` as much
    is allowed.
    """

    function: str
    backend: str
    tags: set[str]
    tensors: Tensors
    call: Callable[[Tensors], Outputs]
    oracle: Callable[[Tensors], Outputs]
    out_dtypes: tuple[torch.dtype, ...]
    needs: set[str] = field(default_factory=set)
    incoming: tuple[Tensor | None, ...] = ()
    mode: str = "grad"
    cast: frozenset[str] = frozenset()
    autocast: torch.dtype = torch.bfloat16
    fixed: Mapping[str, Any] = field(default_factory=dict)
    decided: Callable[[Tensors], bool] = always
    exact_ties: bool = False
    dense_gradients: bool = True
    dense_outputs: bool = True
    chain: bool = False
    twice: bool = False
    repeat: bool = False
    _attached: list[bool] = field(default_factory=list)

    def run(self) -> None:
        """Raise an AssertionError where a promise is broken."""
        with strict_warnings():
            self._run()

    # ------------------------------------------------------------ the call

    def _run(self) -> None:
        for name in self.needs:
            x = self.tensors[name]
            assert x is not None
            x.requires_grad_()
        held = {name: x for name, x in {**self.tensors, **self.fixed}.items() if isinstance(x, Tensor)}
        before = {name: x.detach().clone() for name, x in held.items()}
        outputs, grads, second = self._ours()
        for name, x in held.items():
            assert same_bits(x.detach(), before[name]), f"{self.function} wrote to its input {name}"
            assert x.grad is None, f"{self.function} left a .grad on {name}"
        if self.repeat:
            again = self._ours()
            for x, y in zip((*outputs, *grads, *second), (*again[0], *again[1], *again[2]), strict=True):
                assert same_bits(x.detach(), y.detach()), f"{self.function}: the same call gave other bits"
        self._judge(outputs, grads, second)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that want a gradient, each once."""
        found: dict[str, Tensor] = {}
        for name, x in self.tensors.items():
            if x is not None and x.requires_grad and all(x is not y for y in found.values()):
                found[name] = x
        return found

    def _ours(self) -> tuple[Outputs, Outputs, Outputs]:
        if self.mode == "no_grad":
            with torch.no_grad():
                outputs = self.call(self.tensors)
        elif self.mode == "inference":
            with torch.inference_mode():
                outputs = self.call({name: None if x is None else x * 1 for name, x in self.tensors.items()})
        elif self.mode == "autocast":
            with torch.autocast(DEVICE, self.autocast):
                outputs = self.call(self.tensors)
        else:
            outputs = self.call(self.tensors)
        wants = bool(self.needs) and self.mode in ("grad", "autocast")
        for i, (out, dtype) in enumerate(zip(outputs, self.out_dtypes, strict=True)):
            assert out.dtype == dtype, f"{self.function} output {i} is {out.dtype}, not {dtype}"
            # What an output asks for that none of its leaves do is the oracle's to say: see `_judge`.
            assert wants or not out.requires_grad, f"{self.function} output {i} wants a gradient"
        return (outputs, *self._gradients(outputs, self.tensors, self.incoming if wants else ()))

    def _gradients(
        self, outputs: Outputs, tensors: Tensors, incoming: tuple[Tensor | None, ...]
    ) -> tuple[Outputs, Outputs]:
        """The leaves' gradients, and the gradients of those times fixed directions."""
        leaves = [x for name in self.leaves() if (x := tensors[name]) is not None]
        used = [(out, g) for out, g in zip(outputs, incoming, strict=False) if g is not None]
        if not used or not leaves:
            return (), ()
        used = [(out, g) for out, g in used if out.requires_grad]
        if not used:
            nothing = tuple(torch.zeros_like(x) for x in leaves)
            return nothing, nothing if self.twice else ()
        grads = torch.autograd.grad(
            [out for out, _ in used], leaves, [g for _, g in used], create_graph=self.twice, materialize_grads=True
        )
        if not self.twice:
            return grads, ()
        along = [
            torch.cos(torch.arange(g.numel(), dtype=torch.float64)).view(g.shape).to(g.device, g.dtype) for g in grads
        ]
        pairs = [(g, v) for g, v in zip(grads, along, strict=True) if g.requires_grad]
        if not pairs:
            return tuple(g.detach() for g in grads), tuple(torch.zeros_like(x) for x in leaves)
        second = torch.autograd.grad(
            [g for g, _ in pairs], leaves, [v for _, v in pairs], materialize_grads=True, allow_unused=True
        )
        return tuple(g.detach() for g in grads), second

    # ------------------------------------------------------------ the judge

    def _wide(self, rounded: Callable[[Tensor], Tensor] | None = None, dtype: torch.dtype = torch.float64) -> Tensors:
        """The tensors as the oracle takes them; one tensor under two names stays one."""
        made: dict[int, Tensor] = {}
        wide: Tensors = {}
        for name, x in self.tensors.items():
            if x is None:
                wide[name] = None
                continue
            if id(x) not in made:
                y = x.detach()
                if self.mode == "autocast" and name in self.cast and y.dtype != torch.float64:
                    y = y.to(self.autocast)
                y = y.to(dtype).cpu().clone()
                made[id(x)] = (y if rounded is None else rounded(y)).requires_grad_(x.requires_grad)
            wide[name] = made[id(x)]
        return wide

    def _exact(
        self, rounded: Callable[[Tensor], Tensor] | None = None, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        wide = self._wide(rounded, dtype)
        outputs = self.oracle(wide)
        self._attached = [out.requires_grad for out in outputs]
        wants = bool(self.needs) and self.mode in ("grad", "autocast")
        incoming = tuple(None if g is None else g.to(dtype).cpu() for g in self.incoming) if wants else ()
        if wants:
            # An empty sum has no graph: a gradient of nothing is 0.
            anchor = torch.stack([(0 * x.nan_to_num()).sum() for x in wide.values() if x is not None]).sum()
            outputs = tuple(out if out.requires_grad else out + anchor for out in outputs)
        grads, second = self._gradients(outputs, wide, incoming)
        return [*(out.detach() for out in outputs), *grads, *second]

    def held(self, dtype: torch.dtype) -> torch.dtype:
        """What a result of this dtype was held in on its way: under autocast to float16 that, which has less room."""
        cast = self.mode == "autocast" and self.autocast == torch.float16 and dtype != torch.float64
        return torch.float16 if cast else dtype

    def tolerance(self) -> float:
        dtypes = {x.dtype for x in self.tensors.values() if x is not None} | set(self.out_dtypes)
        if self.mode == "autocast" and any(x is not None and x.dtype != torch.float64 for x in self.tensors.values()):
            dtypes.add(self.autocast)
        return tolerance(*dtypes)

    def _judge(self, outputs: Outputs, grads: Outputs, second: Outputs) -> None:
        wants = bool(self.needs) and self.mode in ("grad", "autocast")
        tol, exact = self.tolerance(), self._exact()
        sizes = [torch.zeros_like(x) for x in exact] if self.exact_ties else moves(self._exact, exact, tol)
        if self.chain and outputs[0].dtype in HALVES:
            rough = self._exact(dtype=outputs[0].dtype)
            # `assert_close` allows tol times half of the size.
            sizes = [
                size + 2 * TIMES_THE_LOOPS_ERROR / tol * (x.double() - y).square().mean().sqrt()
                for size, x, y in zip(sizes, rough, exact, strict=True)
            ]
        found = [*outputs, *grads, *second]
        names = [f"{self.function} output {i}" for i in range(len(outputs))]
        for out, attached, name in zip(outputs, self._attached, names, strict=True):
            assert out.requires_grad or not attached or not wants, f"{name} wants no gradient"
        leaves = self.leaves()
        if grads:
            names += [f"{self.function} d{name}" for name in leaves]
        if second:
            names += [f"{self.function} second derivative, d{name}" for name in leaves]
        # Of nothing a gradient is 0, and 0 · NaN is NaN on the oracle's way to it.
        dense = self.dense_gradients and all(out.numel() for out in outputs)
        decided = not grads or self.decided(self._wide())
        if not decided:
            self.tags.add("near tie: values only")
        for x, y, size, name in zip(found, exact, sizes, names, strict=True):
            if " d" in name and not decided:
                continue
            own = self.tensors.get(name.rpartition(" d")[2]) if " d" in name and not dense else None
            if own is not None and own.dim():
                # A row of NaN has a gradient of NaN, whoever it met.
                y = y.masked_fill(~own.detach().cpu().isfinite().all(-1, keepdim=True), torch.nan)
            # torch's second derivative of a norm at 0 is 0 / 0; whoever has a number there is no worse.
            known = "second derivative" not in name or "zero row" not in self.tags
            compare(
                x.detach().cpu(),
                y.detach(),
                size,
                max(tol, NUMBERS) if " dlogit" in name and x.dtype == torch.float32 else tol,
                name,
                spreads=self.backend == "triton",
                held=self.held(x.dtype),
                dense=dense and known if " d" in name else self.dense_outputs,
            )
        for grad, (name, x) in zip(grads, leaves.items(), strict=False):
            assert grad.dtype == x.dtype and grad.shape == x.shape, f"d{name} is {grad.dtype} {tuple(grad.shape)}"


#: What the gradient of a learned number may err in float32: a row's log-sum-exp, itself a float32, shifts all of the
#: row's probabilities together, by several roundings, and their sum may cancel down to that.
NUMBERS = 1e-5
#: How near to the largest number of a dtype a result must be for its rounding to decide whether it is finite.
EDGE = 0.1
#: How many times as large as its terms of random signs a part of a sum may be.
PARTS = 4.0


def compare(
    actual: Tensor, exact: Tensor, size: Tensor, tol: float, name: str, *,
    spreads: bool, held: torch.dtype, dense: bool = True,
) -> None:  # fmt: skip
    """Finite where the exact result is, and near it there, as far as `held` has room for it.

    With `spreads` a row that holds something not finite need be finite nowhere: blocks that share a tile share it.
    Without `dense` what is not finite in the exact result may be anything.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    limit = torch.finfo(held).max
    lost = ~exact.isfinite() | (exact.abs() > (1 + EDGE) * torch.finfo(actual.dtype).max)
    # Parts of a gradient that autograd adds up in the result's dtype may be too large for it where their sum is not.
    fine = exact.isfinite() & (torch.maximum(exact.abs(), PARTS * size) < (1 - EDGE) * limit)
    if spreads and actual.dim():
        fine &= fine.all(-1, keepdim=True)
    finite = actual.isfinite()
    for wrong, what in ((fine & ~finite, "is not finite"), (lost & finite & dense, "is finite")):
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{name} {tuple(exact.shape)}: {int(wrong.sum())} entries wrongly so, the first {list(at)}, {what}: "
                f"got {actual[at].item():.6g}, expected {exact[at].item():.6g}"
            )
    keep = fine & finite
    # What is rounded to the dtype's smallest numbers is off by half of one.
    size = size + torch.finfo(held).smallest_normal
    assert_close(actual[keep], exact[keep], tol, name=name, size=size[keep])


def same_bits(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return bool(((x == y) | ((x != x) & (y != y))).all())


@contextlib.contextmanager
def strict_warnings() -> Iterator[None]:
    """Any warning is a fault, but the metrics' and NumPy's, which the interpreter hands them, of NaN and Inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter|numpy\..*")
        warnings.filterwarnings("ignore", category=UserWarning, message=r".* holds? NaN or infinity, the first is")
        # Triton 3.6's makes numbers of arrays, of which NumPy 2.3 warns.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"triton\.runtime\.interpreter")
        yield
