"""Kinds of arguments, and what is wrong for each: how it is made of a right value, the error and what that says."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Wrong:
    """A wrong value.

    Attributes:
        name: Of the case.
        make: The wrong value, of the right one.
        error: The error's very type.
        came: What the message says of the value that came: its "type", "dtype", "shape", "device" or "value"; of a
            sequence the type of its first "element", or the "last".
        wanted: What the message must hold besides, of what was wanted.
    """

    name: str
    make: Callable[[Any], Any]
    error: type[Exception]
    came: str
    wanted: tuple[str, ...] = ()

    def says(self, value: Any) -> list[str]:
        """What the message must hold besides the argument's name."""
        came = {
            "type": lambda: type(value).__name__,
            "dtype": lambda: str(value.dtype).removeprefix("torch."),
            "shape": lambda: str(tuple(value.shape)),
            "device": lambda: str(value.device),
            "value": lambda: repr(value),
            "element": lambda: type(value[0]).__name__,
            "last": lambda: repr(value[-1]),
        }[self.came]()
        return [came, *self.wanted]


def of_types(wanted: str, *values: Any) -> list[Wrong]:
    """Values of wrong Python types."""
    return [Wrong(type(x).__name__, lambda good, x=x: x, TypeError, "type", (wanted,)) for x in values]


def values(wanted: str, *wrong: Any) -> list[Wrong]:
    """Values of the right type that do not fit."""
    return [Wrong(repr(x), lambda good, x=x: x, ValueError, "value", (wanted,)) for x in wrong]


def shaped(name: str, make: Callable[[Tensor], Tensor], *wanted: str) -> Wrong:
    return Wrong(name, make, ValueError, "shape", wanted)


def typed(*dtypes: torch.dtype, wanted: str) -> list[Wrong]:
    return [Wrong(str(d), lambda x, d=d: x.to(d), ValueError, "dtype", (wanted,)) for d in dtypes]


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


NO_TENSOR = [
    Wrong("list", lambda x: x.tolist(), TypeError, "type", ("torch.Tensor",)),
    *of_types("torch.Tensor", 1.0, "four", object()),
]
NO_ARRAY = Wrong("numpy", _numpy, TypeError, "type", ("torch.Tensor",))
NONE = of_types("torch.Tensor", None)
ELSEWHERE = Wrong("elsewhere", lambda x: x.to("meta"), ValueError, "device", ("device",))
NO_FLOAT = typed(
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, wanted="float32"
)
OTHER_FLOAT = [
    Wrong("float64", Tensor.double, ValueError, "dtype", ("same dtype", "float32")),
    Wrong("float16", Tensor.half, ValueError, "dtype", ("same dtype", "float32")),
]
FEWER_CHANNELS = shaped("fewer channels", lambda x: x[..., :-1])
NO_INTEGER = typed(torch.float32, torch.bool, torch.complex64, wanted="integers")

#: Features of any rank, (..., D).
FEATURES = [
    *NO_TENSOR, NO_ARRAY, *NONE, *NO_FLOAT, ELSEWHERE, FEWER_CHANNELS,
    shaped("0-d", lambda x: x.flatten()[0], "D)"),
]  # fmt: skip
#: Features that meet others, (..., rows, D).
ROWS = [*FEATURES, *OTHER_FLOAT, shaped("1-d", lambda x: x.flatten(0, -2)[0], "D)")]
MATRIX = [*ROWS, shaped("3-d", lambda x: x[None], "D)")]
#: Anything that two features' shapes must agree in besides D.
WITHOUT_PARTNER = [wrong for wrong in MATRIX if wrong not in OTHER_FLOAT]
PAIRED = [shaped("fewer rows", lambda x: x[..., :-1, :], "rows")]
NO_BROADCAST = [shaped("leading dimensions", lambda x: x[:1].expand(5, *x.shape[1:]), "broadcast")]

WEIGHT = [*NO_TENSOR, NO_ARRAY, *NO_FLOAT, ELSEWHERE]
DIAG = [*WEIGHT, shaped("short", lambda w: w[..., :-1]), shaped("0-d", lambda w: w.flatten()[0], "(D,)")]
BLOCKS = [
    *WEIGHT,
    shaped("2-d", lambda w: w.flatten(0, -3)[0], "(G, B, B)"),
    shaped("not square", lambda w: w[..., :4], "(G, B, B)"),
    shaped("too few", lambda w: w[..., :2, :, :], "16", "24"),
    shaped("blocks of nothing", lambda w: w[..., :0, :0], "(G, B, B)"),
]
LABELS = [
    *NO_TENSOR, NO_ARRAY, *NO_INTEGER, ELSEWHERE,
    shaped("short", lambda x: x[1:], "shape (", ",)"),
    shaped("long", lambda x: x.repeat(2), "shape (", ",)"),
    shaped("2-d", lambda x: x[None], "shape (", ",)"),
    shaped("0-d", lambda x: x[0], "shape (", ",)"),
]  # fmt: skip
MASK = [*NO_TENSOR, NO_ARRAY, ELSEWHERE, shaped("short", lambda x: x[..., 1:]), shaped("1-d", lambda x: x.flatten())]

NUMBER = of_types("number", None, "0.5", [0.5], True, 1j, torch.tensor(0.5), np.ones(1))

KINDS: dict[str, list[Wrong]] = {
    "features": FEATURES,
    "features, rows": ROWS,
    "features, rows, batch": [*ROWS, *NO_BROADCAST],
    "features, paired": [*ROWS, *PAIRED, *NO_BROADCAST],
    "features, matrix": MATRIX,
    "features, paired matrix": [*MATRIX, *PAIRED],
    "features, paired rows": [*ROWS, *PAIRED],
    "features, attended rows": [*ROWS, *PAIRED, *NO_BROADCAST],
    "features, tokens": [
        *NO_TENSOR, NO_ARRAY, *NONE, *NO_FLOAT, ELSEWHERE, FEWER_CHANNELS,
        shaped("1-d", lambda x: x[0, 0], "E)"), shaped("4-d", lambda x: x[None], "E)"),
        shaped("2-d", lambda x: x[0]), shaped("batch", lambda x: x[:1]),
    ],
    "features, one matrix": WITHOUT_PARTNER,
    "features, items": [*ROWS, shaped("2-d", lambda x: x[0], "D)"), shaped("4-d", lambda x: x[None], "D)")],
    "features, values": [
        wrong for wrong in [*ROWS, *PAIRED, *NO_BROADCAST] if wrong is not FEWER_CHANNELS  # any E
    ],
    "features, tensor or array": [
        *(wrong for wrong in MATRIX if wrong is not NO_ARRAY),
        Wrong("1-d array", lambda x: _numpy(x)[0], ValueError, "shape", ("(N, D)",)),
        Wrong("array of channels", lambda x: _numpy(x)[:, :-1], ValueError, "shape", ("same D",)),
        *(
            Wrong(f"{dtype} array", lambda x, d=dtype: _numpy(x).astype(d), ValueError, "dtype", ("same dtype",))
            for dtype in ("f8", "i8", "c8", "O", "U3")
        ),
    ],
    "features, heads": [wrong for wrong in ROWS if wrong not in OTHER_FLOAT],
    "W_diag": [*DIAG, shaped("2-d", lambda w: w[None], "(D,)")],
    "W_diag, wanted": [*DIAG, *NONE],
    "W_diag, heads": [*DIAG, shaped("heads", lambda w: w[1:], "(H, D)"), shaped("3-d", lambda w: w[None])],
    "W_blocks": [*BLOCKS, shaped("4-d", lambda w: w[None], "(G, B, B)")],
    "W_blocks, wanted": [*BLOCKS, *NONE],
    "W_blocks, heads": [*BLOCKS, shaped("heads", lambda w: w[1:], "(H, G, B, B)"), shaped("5-d", lambda w: w[None])],
    "labels": [*LABELS, *NONE],
    "labels or None": LABELS,
    "mask of pairs": [*MASK, *typed(torch.float32, torch.complex64, wanted="bool")],
    "mask of rows": [*MASK, *typed(torch.float32, torch.complex64, wanted="bool")],
    "mask of scores": [
        *MASK,
        shaped("larger", lambda x: x.expand(9, *x.shape)),
        *typed(torch.int64, torch.uint8, torch.complex64, wanted="bool"),
    ],
    "flag": of_types("True or False", None, 1, 0.0, "yes", [True], np.True_, torch.tensor(True)),
    "number": [*NUMBER, *values("finite", float("nan"), float("inf"))],
    "number or None": [*NUMBER[1:], *values("finite", float("nan"), float("-inf"))],
    "positive number": [*NUMBER, *values("positive", 0, -1.0, float("nan"), float("inf"))],
    "positive number or infinity": [*NUMBER, *values("positive", 0.0, -1, float("nan"), float("-inf"))],
    "fraction": [*NUMBER, *values("at least 0 and less than 1", 1.0, -0.1, float("nan"), float("inf"))],
    "probability": [*NUMBER, *values("between 0 and 1", 1.1, -0.1, float("nan"), float("inf"))],
    "number or tensor": [
        *of_types("number", None, "5", [5.0], True, 1j, np.ones(1)),
        Wrong("two elements", lambda x: torch.ones(2), ValueError, "shape", ("one element",)),
        Wrong("no element", lambda x: torch.ones(0), ValueError, "shape", ("one element",)),
        Wrong("integer", lambda x: torch.tensor(5), ValueError, "dtype", ("float32",)),
        Wrong("complex", lambda x: torch.tensor(5j), ValueError, "dtype", ("float32",)),
        Wrong("bool tensor", lambda x: torch.tensor(True), ValueError, "dtype", ("float32",)),
        Wrong("elsewhere", lambda x: torch.ones((), device="meta"), ValueError, "device", ("device",)),
    ],
    "count": [
        *of_types("int", None, 3.0, "3", True, [3], torch.tensor(3), np.ones(1, int)),
        *values("at least", -1),
    ],
    "count within": [
        *of_types("int", None, 3.0, "3", True, [3], torch.tensor(3), np.ones(1, int)),
        *values("between", 10**9),
    ],
    "count within k": [
        *of_types("int", None, 3.0, "3", True, [3], torch.tensor(3), np.ones(1, int)),
        *values("at least", -1),
        *values("the gallery's 6 items", 7),
    ],
    "size": [*of_types("int", None, 8.0, "8", True, (8,), torch.tensor(8)), *values("at least 1", 0, -8)],
    "size or None": [*of_types("int", 8.0, "8", True, (8,), torch.tensor(8)), *values("at least 1", 0, -8)],
    "divisor": [*of_types("int", None, 8.0, "8", True, (8,), torch.tensor(8)), *values("must divide", 0, -8, 7)],
    "divisor or None": [*of_types("int", 8.0, "8", True, (8,), torch.tensor(8)), *values("must divide", 0, -8, 7)],
    "choice": [
        *of_types("one of", None, 3, True, ["mean"], torch.tensor(1.0), np.ones(2)),
        *values("one of", "", "MEAN", "no such choice"),
    ],
    "dtype": [
        *of_types("torch.dtype", "float32", np.dtype("f4"), float, 32),
        *values("float32", torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn),
    ],
    "device": [*of_types("torch.device", 1.5, True, ["cpu"]), *values("torch.device", "nowhere", "")],
    "group": of_types("process group", 3, "gloo", [0, 1], True),
    "cut-offs": [
        *of_types("sequence", None, 5, 5.0, {5}, torch.tensor([5])),
        *values("at least one", (), []),
        *(
            Wrong(repr(x), lambda good, x=x: x, TypeError, "element", ("ints",))
            for x in ((1.5,), (True,), "15", (None,))
        ),
        Wrong("zero", lambda good: (1, 0), ValueError, "last", ("at least 1",)),
    ],
    "metric": of_types("GSSF", None, nn.Linear(2, 2), torch.ones(2), "gssf"),
    "metric or None": of_types("GSSF", nn.Linear(2, 2), torch.ones(2), "gssf"),
    "module": of_types("torch.nn.Module", None, torch.ones(2), "loss", torch.relu),
    "axes": of_types("Axes", 1, "ax", [None]),
    "score parts": of_types("ScoreParts", None, torch.ones(3), (1.0, 2.0)),
    "histogram": of_types("SimilarityHistogram", None, torch.ones(3), [1.0, 2.0]),
    "features, one matrix or array": [
        *(wrong for wrong in WITHOUT_PARTNER if wrong not in (NO_ARRAY, ELSEWHERE, FEWER_CHANNELS)),
        *(
            Wrong(f"{dtype} array", lambda x, d=dtype: _numpy(x).astype(d), ValueError, "dtype", ("float32",))
            for dtype in ("i8", "?", "c8", "g", "O", "U3")
        ),
        Wrong("1-d array", lambda x: _numpy(x)[0], ValueError, "shape", ("D)",)),
    ],
    "features, array or None": [
        *(wrong for wrong in WITHOUT_PARTNER if wrong not in (NO_ARRAY, ELSEWHERE, *NONE)),
    ],
    "query of references": [wrong for wrong in WITHOUT_PARTNER if wrong is not ELSEWHERE],
    "reference": [wrong for wrong in WITHOUT_PARTNER if wrong not in (ELSEWHERE, *NONE)],
    "W_diag, alone": [*(wrong for wrong in DIAG if wrong is not ELSEWHERE), shaped("2-d", lambda w: w[None], "(D,)")],
    "W_blocks, alone": [wrong for wrong in BLOCKS if wrong is not ELSEWHERE],
    "divisor of a head or None": [
        *of_types("int", 8.0, "8", True, (8,), torch.tensor(8)),
        *values("at least 1", 0, -8),
        *values("must divide", 7),
    ],
    "embeddings": [
        *of_types("torch.Tensor", None, "text", 1.0, (1.0, 2.0)),
        *typed(torch.complex64, wanted="real"),
        FEWER_CHANNELS,
        Wrong("texts", lambda x: ["a", "b"], ValueError, "type", ("embeddings",)),
        Wrong("ragged", lambda x: [torch.ones(24), torch.ones(23)], ValueError, "type", ("one length",)),
    ],
    "text": of_types("str", None, 3, ["Flat"]),
    "index": of_types("faiss.Index", None, "index", torch.ones(2)),
    "similarity": of_types("GSSFSimilarity", None, torch.cosine_similarity, nn.Linear(2, 2)),
    "distance": of_types("GSSFDistance", None, torch.cosine_similarity, nn.Linear(2, 2)),
    "model": of_types("PreTrainedModel", None, nn.Linear(2, 2), "bert"),
    "model class": of_types("PreTrainedModel class", None, nn.Linear, "bert", 7),
    "inputs": of_types("mapping", [1], "text", torch.ones(2)),
    "path": of_types("path", None, 7, ["folder"], 1.5),
}  # fmt: skip


#: Views, and buffers nobody has written to (but conftest, which poisons them): no kernel runs for them. And a loss
#: module's own scale, one number.
FREE = ("alias", "detach", "expand", "select", "slice", "t", "transpose", "unsqueeze", "view")
POISONED = ("empty", "new_empty", "fill_")
OWN_SCALE = ("exp", "clamp", "sub", "add", "mul", "nan_to_num")


class NothingRuns(TorchDispatchMode):
    """Fails where an operator would do work, on whichever device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        one_number = name in OWN_SCALE and all(x.numel() == 1 for x in args if isinstance(x, torch.Tensor))
        assert name in FREE + POISONED or one_number, f"{func} ran before the error"
        return func(*args, **(kwargs or {}))


def assert_says(message: str, wanted: list[str]) -> None:
    for fragment in wanted:
        whole_word = rf"(?<!\w){re.escape(fragment)}(?!\w)" if fragment.isidentifier() else re.escape(fragment)
        assert re.search(whole_word, message), f"{fragment!r} is missing in: {message}"


def complaint(function: Any, arguments: dict[str, Any], *, may_run: bool = False) -> Exception:
    """The error of a call, which must not have begun to compute."""
    try:
        with nullcontext() if may_run else NothingRuns():
            function(**arguments)
    except AssertionError:
        raise
    except Exception as error:
        return error
    raise AssertionError("no error")


def faults_of(function: Any, good: dict[str, Any], parameter: str, kind: str, *, may_run: bool = False) -> list[str]:
    """What is wrong with the errors about each wrong value of one argument."""
    faults = []
    for wrong in KINDS[kind]:
        value = wrong.make(good.get(parameter))
        try:
            error = complaint(function, good | {parameter: value}, may_run=may_run)
            assert type(error) is wrong.error, f"{type(error).__name__}, not {wrong.error.__name__}: {error}"
            assert_says(str(error), [parameter, *wrong.says(value)])
        except AssertionError as fault:
            faults.append(f"{wrong.name}: {fault}".splitlines()[0])
    return faults
