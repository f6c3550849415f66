"""Cases of gssf_triton.nn: what a module computes, and that its copies compute the same bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support import losses_reference, reference
from torch import Tensor, nn

from fuzz import attention
from fuzz.draw import Draw
from fuzz.judges import Case, Outputs, Tensors, same_bits, strict_warnings
from fuzz.similarities import choose_incoming
from gssf_triton.nn import GSSF, DistillationLoss, GSSFAttention, InfoNCELoss, SigmoidLoss, TripletLoss


@dataclass
class Module:
    """A module's call as a case, then the same call on copies of the module."""

    case: Case
    module: nn.Module
    #: The call on a module, of the case's inputs.
    use: Callable[[Any, Tensors], Outputs]
    #: A module of the same construction.
    fresh: Callable[[], nn.Module]
    copies: tuple[str, ...]

    @property
    def function(self) -> str:
        return self.case.function

    @property
    def backend(self) -> str:
        return self.case.backend

    @property
    def tags(self) -> set[str]:
        return self.case.tags

    def run(self) -> None:
        """Raise an AssertionError where a promise is broken."""
        self.case.run()
        with strict_warnings(), torch.no_grad():
            for how in self.copies:
                again = _copied(self.module, how, self.fresh)
                assert again.training == self.module.training
                mine, theirs = self.module.state_dict(), again.state_dict()
                assert mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in mine)
                shared = {x.data_ptr() for x in self.module.parameters()} & {x.data_ptr() for x in again.parameters()}
                assert not shared, f"{self.function}: {how} shares parameters with the original"
                for x, y in zip(
                    self.use(self.module, self.case.tensors), self.use(again, self.case.tensors), strict=True
                ):
                    assert same_bits(x, y), f"{self.function}: after {how} the same call gives other bits"


def _copied(module: nn.Module, how: str, fresh: Callable[[], nn.Module]) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        loaded: nn.Module = pickle.loads(pickle.dumps(module))
        return loaded
    made, buffer = fresh(), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    made.load_state_dict(torch.load(buffer, weights_only=True))
    return made.train(module.training)


def _shaken(d: Draw, module: nn.Module) -> None:
    """Parameters off their start, as after training."""
    with torch.no_grad():
        for name, x in module.named_parameters():
            if not name.endswith("log_logit_scale"):
                x += d.normal(*x.shape, scale=0.3, dtype=x.dtype)


def _metric(d: Draw, dtype: torch.dtype) -> tuple[GSSF, dict[str, Any]]:
    G, B = d.channels(96)
    kind = d.kind()
    made = {
        "dim": G * B, "block_size": B, "diag": "diag" in kind, "blocks": "blocks" in kind,
        "normalize": d.maybe(0.6, "normalize"), "dtype": dtype, "device": d.normal().device,
    }  # fmt: skip
    metric = GSSF(**made)
    if d.maybe(0.8):
        _shaken(d, metric)
    else:
        d.tag("as constructed")
    return metric, made


def _parameter_dtype(d: Draw) -> torch.dtype:
    if d.dtype in (torch.float16, torch.bfloat16) and d.maybe(0.6, "float32 weights"):
        return torch.float32
    return d.dtype


def _assemble(
    d: Draw,
    module: nn.Module,
    fresh: Callable[[], nn.Module],
    inputs: Tensors,
    use: Callable[[Any, Tensors], Outputs],
    oracle: Callable[[Tensors], Outputs],
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    decided: Callable[[Tensors], bool] | None = None,
) -> Module:
    """The module's parameters are tensors of the case, so that their gradients are judged, too."""
    d.backend = "torch"  # what "auto" takes on a CPU
    module.train(d.maybe(0.5))
    copies = tuple(how for how in ("deepcopy", "pickle", "state dict") if d.maybe(0.7, how))
    tensors: Tensors = {**inputs, **dict(module.named_parameters())}
    needs = {name for name, x in tensors.items() if x is not None and (name not in inputs or d.maybe(0.7))}
    case = Case(
        function=f"nn.{type(module).__name__}", backend=d.backend, tags=d.tags, tensors=tensors,
        call=lambda given: use(module, given), oracle=oracle, out_dtypes=tuple(dtypes), needs=needs,
        incoming=choose_incoming(d, shapes, dtypes), repeat=d.maybe(0.2, "repeated"),
    )  # fmt: skip
    if decided is not None:
        case.decided = decided
    return Module(case, module, use, fresh, copies)


# ---------------------------------------------------------------- the modules


def gssf(d: Draw) -> Module:
    metric, made = _metric(d, _parameter_dtype(d))
    D, M = made["dim"], d.size(65)
    way = d.choice(("forward", "paired", "transform", "dense"))
    d.tag(way)
    N = M if way == "paired" else d.size(65)
    inputs: Tensors = {"a": d.rows(M, D)} if way == "transform" else {"a": d.rows(M, D), "b": d.rows(N, D)}
    inputs = {} if way == "dense" else inputs
    shape = {"forward": (M, N), "paired": (M,), "transform": (M, D), "dense": (D, D)}[way]
    side = d.choice(("a", "b"))

    def use(module: Any, given: Tensors) -> Outputs:
        if way == "dense":
            return (module.dense(),)
        if way == "transform":
            return (module.transform(given["a"], side=side),)
        return ((module if way == "forward" else module.paired)(given["a"], given["b"]),)

    def oracle(given: Tensors) -> Outputs:
        weights = given.get("W_diag"), given.get("W_blocks")
        a, b, normalize = given.get("a"), given.get("b"), made["normalize"]
        if way == "dense":
            return (reference.dense_metric(*weights),)
        assert a is not None
        if way == "transform":
            return (reference.transform(a, *weights, side=side, normalize=normalize),)
        assert b is not None
        function = reference.pairwise_sim if way == "forward" else reference.paired_sim
        return (function(a, b, *weights, normalize=normalize),)

    dtype = made["dtype"] if way == "dense" else d.dtype
    return _assemble(d, metric, lambda: GSSF(**made), inputs, use, oracle, [shape], [dtype])


def _bounded_exp(log: Tensor, bound: float) -> Tensor:
    """min(exp(log), bound); past the bound with the gradient there, but for what points further out."""
    if float(log.detach().exp()) <= bound:
        return log.exp()
    step = log * 1.0
    if step.requires_grad:
        step.register_hook(lambda grad: grad.clamp_min(0))
    return bound * (1 + step - step.detach())


def losses(d: Draw) -> Module:
    """Any of the loss modules; the metric's parameters and the learned scalars get gradients."""
    wide = torch.promote_types(d.dtype, torch.float32)
    metric, made = _metric(d, wide)
    kind = d.choice(("InfoNCELoss", "SigmoidLoss", "DistillationLoss", "TripletLoss"))
    N, D = d.size(40), made["dim"]
    options: dict[str, Any] = {"reduction": d.choice(("mean", "sum", "none"))}
    if kind == "InfoNCELoss":
        options |= {"symmetric": d.maybe(0.5), "label_smoothing": d.choice((0.0, 0.2))}
    if kind in ("InfoNCELoss", "SigmoidLoss"):
        options |= {"logit_scale": d.choice((1.0, 14.0, 150.0)), "max_logit_scale": 100.0} if kind[0] == "I" else {}
    if kind == "TripletLoss":
        options |= {"margin": 0.2, "hardest": False}
    cls = {x.__name__: x for x in (InfoNCELoss, SigmoidLoss, DistillationLoss, TripletLoss)}[kind]
    module = cls(metric, **options)
    ids = d.integers(0, max(1, N // 2), N) if kind != "DistillationLoss" and d.maybe(0.5, "ids") else None
    scale = 1.0 / D**0.5
    inputs: Tensors = {"a": d.rows(N, D, scale=scale), "b": d.rows(N, D, scale=scale)}
    teachers = (d.rows(N, 7), d.rows(N, 7)) if kind == "DistillationLoss" else ()

    def use(used: Any, given: Tensors) -> Outputs:
        return (used(given["a"], given["b"], *(teachers if teachers else (ids,))),)

    def oracle(given: Tensors) -> Outputs:
        known: dict[str, Any] = {"W_diag": given.get("metric.W_diag"), "W_blocks": given.get("metric.W_blocks")}
        known |= {"normalize": made["normalize"], "reduction": options["reduction"]}
        if kind == "TripletLoss":
            known |= {"margin": 0.2, "hardest": False}
        elif kind == "DistillationLoss":
            x, y = (t.cpu().double() for t in teachers)
            plain = {"teacher_a": x, "teacher_b": y, "teacher_W_diag": None, "teacher_W_blocks": None}
            known |= {"teacher": plain, "logit_scale": torch.tensor(module.logit_scale, dtype=torch.float64)}
        else:
            log_scale = given["log_logit_scale"]
            assert log_scale is not None
            known["logit_scale"] = _bounded_exp(log_scale, module.max_logit_scale).reshape(())
        if kind == "InfoNCELoss":
            known |= {name: options[name] for name in ("symmetric", "label_smoothing")}
        if kind == "SigmoidLoss":
            bias = given["logit_bias"]
            assert bias is not None
            known["logit_bias"] = bias.reshape(())
        if kind != "DistillationLoss":
            known["ids"] = None if ids is None else ids.cpu()
        name = {"InfoNCELoss": "info_nce", "SigmoidLoss": "sigmoid_loss", "TripletLoss": "triplet_loss"}.get(kind)
        function = getattr(losses_reference, name or "distillation_loss")
        return (function(given["a"], given["b"], **known),)

    shape = (N,) if options["reduction"] == "none" else ()
    decided = (lambda given: False) if kind == "TripletLoss" else None
    return _assemble(d, module, lambda: cls(GSSF(**made), **options), inputs, use, oracle, [shape], [wide], decided)


def attention_module(d: Draw) -> Module:
    """GSSFAttention: the projections, the oracle of `attention`, and the output projection."""
    H, G, B = d.choice((1, 2, 4)), d.choice((1, 2, 3)), d.choice((1, 2, 5, 8))
    dtype, E = d.dtype, H * G * B
    made: dict[str, Any] = {
        "embed_dim": E, "num_heads": H, "bias": d.maybe(0.7), "batch_first": d.maybe(0.5), "block_size": B,
        "kdim": d.choice((None, 11)), "vdim": d.choice((None, 7)), "dtype": dtype, "device": d.normal().device,
    }  # fmt: skip
    if d.maybe(0.3):
        made["diag"] = False
    module = GSSFAttention(**made)
    _shaken(d, module)
    N, L, S = d.choice((1, 2, 3)), d.size(17, empty=0.0), d.size(17, empty=0.0)
    need_weights, is_causal = d.maybe(0.5, "need_weights"), d.maybe(0.2, "mask: causal")

    def side(n: int, channels: int) -> Tensor:
        return d.rows(*((N, n) if made["batch_first"] else (n, N)), channels)

    inputs: Tensors = {"query": side(L, E), "key": side(S, module.kdim), "value": side(S, module.vdim)}
    mask = d.flags(L, S, share=0.3) if not is_causal and d.maybe(0.4, "mask: bool") else None
    if mask is not None:
        mask[:, 0] = False

    def use(used: Any, given: Tensors) -> Outputs:
        out, weights = used(*(given[name] for name in inputs), need_weights=need_weights, attn_mask=mask,
                            is_causal=is_causal)  # fmt: skip
        assert (weights is None) != need_weights
        return (out,)

    def oracle(given: Tensors) -> Outputs:
        rows = [x if made["batch_first"] else x.transpose(0, 1) for name in inputs if (x := given[name]) is not None]
        packed = given.get("in_proj_weight")
        parts = packed.chunk(3) if packed is not None else [given[f"{name}_proj_weight"] for name in "qkv"]
        bias = given.get("in_proj_bias")
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (H, -1)).transpose(1, 2)  # type: ignore[arg-type]
            for x, w, b in zip(rows, parts, biases, strict=True)
        )
        keep = None if mask is None else ~mask.cpu()
        heads = attention.oracle(q, k, v, given.get("W_diag"), given.get("W_blocks"), keep, is_causal)
        out = nn.functional.linear(
            heads.transpose(1, 2).flatten(-2), given["out_proj.weight"], given.get("out_proj.bias")
        )
        return (out if made["batch_first"] else out.transpose(0, 1),)

    shape = (N, L, E) if made["batch_first"] else (L, N, E)
    whole = _assemble(d, module, lambda: GSSFAttention(**made), inputs, use, oracle, [shape], [dtype])
    whole.case.chain = True
    return whole


FAMILY: dict[str, Callable[[Draw], Module]] = {
    "nn.GSSF": gssf,
    "nn.losses": losses,
    "nn.GSSFAttention": attention_module,
}
