"""When tables are looked at and when the tuner runs: GSSF_AUTOTUNE, captures, tracing, threads, several devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tuner_kit import CPU, H100, OTHER_GPU, a_chunk, cache, measured, pretend, stream_key  # noqa: F401
from torch import Tensor

import gssf_triton
from gssf_triton.autotune import hook, lookup, tuner
from gssf_triton.autotune.model import EPILOGUE_KERNELS, candidates
from gssf_triton.autotune.space import Key, make_key
from gssf_triton.kernels import choice, devices
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.configs import ChunkConfig, PairwiseConfig, chunk_config
from gssf_triton.kernels.devices import Device, identify, identify_for_torch
from gssf_triton.kernels.plans import PLANS, PlanChoice
from gssf_triton.metric import Metric
from gssf_triton.similarity import bilinear
from gssf_triton.streaming.chunks import stream_chunk

pytestmark = pytest.mark.usefixtures("cache")

SHAPE = (4096, 4096, 256)
CHUNK = a_chunk(512)


def chunk(rows: int = 4096) -> ChunkConfig:
    return stream_chunk(rows, rows, 256, torch.float32, CPU)


@pytest.fixture
def tuned_keys(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """A tuner that finds a chunk of 512 rows at once; the list of what it was asked for."""
    asked: list[Key] = []

    def tune(key: Key, where: torch.device) -> None:
        asked.append(key)
        if key.kernel == "chunk":
            lookup.learn(identify_for_torch(where), {key: CHUNK})

    monkeypatch.setattr(tuner, "tune_on_first_use", tune)
    return asked


# ------------------------------------------------------------------------------------------------------------ modes


def test_with_no_table_the_model_answers_and_nothing_is_written(cache: Path, tuned_keys: list[Key]) -> None:  # noqa: F811
    assert chunk() == chunk_config("cpu") == ChunkConfig(512, 1024)
    assert not tuned_keys and not cache.exists()


@pytest.mark.parametrize("value", ["cached", "CACHED", "", None], ids=str)
def test_cached_reads_tables_and_never_tunes(
    value: str | None, tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup.learn(identify_for_torch(CPU), {stream_key(): CHUNK})
    lookup.forget()
    if value is not None:
        monkeypatch.setenv("GSSF_AUTOTUNE", value)
    assert chunk() == CHUNK.config
    assert chunk(5000) == CHUNK.config, "the same bucket"
    assert chunk(8192) == CHUNK.config, "the next one: its nearest neighbour"
    assert chunk(10**6) == chunk_config("cpu"), "too far"
    assert not tuned_keys


def test_off_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    lookup.learn(identify_for_torch(CPU), {stream_key(): CHUNK})
    lookup.forget()
    monkeypatch.setenv("GSSF_AUTOTUNE", "off")
    monkeypatch.setattr(lookup, "entries_for", lambda device: pytest.fail("a table was looked at"))
    assert chunk() == chunk_config("cpu")


def test_on_tunes_an_unseen_key_once(tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    assert chunk() == CHUNK.config
    assert chunk() == chunk(4097) == CHUNK.config
    assert tuned_keys == [stream_key()]
    lookup.forget()  # another process
    assert chunk() == CHUNK.config and tuned_keys == [stream_key()]


def test_on_does_not_try_again_what_could_not_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    asked: list[Key] = []
    monkeypatch.setattr(tuner, "tune_on_first_use", lambda key, where: asked.append(key))
    assert chunk() == chunk(4100) == chunk_config("cpu")
    lookup.learn(identify_for_torch(CPU), {stream_key(64): CHUNK})  # forgets the answers, not the attempts
    assert chunk() == chunk_config("cpu")
    assert asked == [stream_key()]


def test_an_unknown_mode_warns_once_and_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "sometimes")
    hook._complain.cache_clear()
    with pytest.warns(UserWarning, match="GSSF_AUTOTUNE must be one of off, cached, on, got 'sometimes'") as warned:
        assert hook.mode() == hook.mode() == "cached"
    assert len(warned) == 1


def test_the_interpreter_is_tuned_only_when_asked(tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    choice.choose("fold", CPU, torch.float32, 64, 0, 64, 8)
    assert not tuned_keys
    lookup.forget()
    monkeypatch.setenv("GSSF_AUTOTUNE_INTERPRETER", "1")
    choice.choose("fold", CPU, torch.float32, 64, 0, 64, 8)
    assert tuned_keys == [Key("fold", "fp32", 64, 8, 64, 0)]


# -------------------------------------------------------------------------------------- moments at which never to tune


def test_nothing_is_tuned_while_a_graph_is_captured(tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture gets the model's choice; the first call after it tunes."""
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(hook, "is_capturing", lambda where: torch.cuda.is_current_stream_capturing())
        assert chunk() == chunk_config("cpu") and chunk() == chunk_config("cpu")
        assert not tuned_keys
    assert chunk() == CHUNK.config and tuned_keys == [stream_key()]


def test_capturing_is_asked_of_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of its own device: the current one may be another."""
    asked: list[torch.device] = []

    @contextmanager
    def current(where: torch.device) -> Iterator[None]:
        asked.append(where)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert hook.is_capturing(torch.device("cuda", 1)) and not hook.is_capturing(CPU)
    assert asked == [torch.device("cuda", 1)]


@contextmanager
def tracing(kind: str) -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if kind == "fake tensors":
        with FakeTensorMode():
            yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            yield


@pytest.mark.parametrize("kind", ["fake tensors", "compiling"])
def test_nothing_is_tuned_while_a_tracer_looks_on(
    kind: str, tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    with tracing(kind):
        assert chunk() == chunk_config("cpu")
    assert not tuned_keys
    assert chunk() == CHUNK.config and tuned_keys == [stream_key()]


@pytest.mark.kernels
def test_a_compiled_call_tunes_nothing_while_it_is_traced(
    tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    monkeypatch.setenv("GSSF_AUTOTUNE_INTERPRETER", "1")
    moments: list[bool] = []
    seen = tuner.tune_on_first_use

    def tune(key: Key, where: torch.device) -> None:
        moments.append(hook.is_tracing())
        seen(key, where)

    monkeypatch.setattr(tuner, "tune_on_first_use", tune)
    torch._dynamo.reset()
    a, b, W = torch.randn(5, 16), torch.randn(7, 16), torch.randn(16)
    call = torch.compile(gssf_triton.pairwise_sim, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(a, b, W, backend="triton"), (a * W) @ b.T)
    assert not any(moments), moments
    torch._dynamo.reset()


def test_what_the_tuner_launches_is_not_tuned_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    asked: list[Key] = []
    monkeypatch.setattr(tuner, "tune_on_first_use", lambda key, where: asked.append(key))
    with lookup.tuning():
        assert chunk() == chunk_config("cpu")
    assert not asked
    chunk()
    assert asked == [stream_key()], "and what was answered meanwhile is forgotten"


# --------------------------------------------------------------------------------------------------- graphs and plans


@pytest.mark.kernels
def test_a_graph_keeps_the_plan_it_was_traced_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that changes between tracing and running changes no compiled graph: its shapes depend on the plan."""
    torch._dynamo.reset()
    tensors = [torch.randn(5, 16), torch.randn(7, 16), torch.randn(16), torch.randn(4, 4, 4)]
    tensors = [x.requires_grad_() for x in tensors]
    call = torch.compile(gssf_triton.pairwise_sim, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(gssf_triton.pairwise_sim(*tensors, backend="torch").square().sum(), tensors)
    for kind in PLANS:
        with choice.use(plan=PlanChoice(kind, "more")):
            found = torch.autograd.grad(call(*tensors, backend="triton").square().sum(), tensors)
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.kernels
@pytest.mark.parametrize("fold", ["fewer", "more"])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("rows", [(5, 9), (9, 5), (6, 6)], ids=str)
def test_every_plan_gives_the_same_values_and_gradients(
    kind: str, fold: str, rows: tuple[int, int], device: str
) -> None:
    """Also the side with more rows, which the model never folds."""
    tensors = [torch.randn(n, 24, device=device) for n in rows]
    tensors += [torch.randn(24, device=device), torch.randn(3, 8, 8, device=device)]
    tensors = [x.requires_grad_() for x in tensors]
    dS = torch.randn(rows, device=device)
    for normalize in (False, True):
        reference = gssf_triton.pairwise_sim(*tensors, normalize=normalize, backend="torch")
        with choice.use(plan=PlanChoice(kind, fold)):
            S = gssf_triton.pairwise_sim(*tensors, normalize=normalize, backend="triton")
        torch.testing.assert_close(S, reference, rtol=1e-4, atol=1e-4)
        grads = (torch.autograd.grad(x, tensors, dS) for x in (S, reference))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_forced_plan_reaches_threads_that_inherit_no_context() -> None:
    """As those of autograd's backward pass on a GPU."""
    seen: list[Any] = []

    def ask() -> None:
        for kernel in ("plan", "gradient_plan"):
            seen.append(choice.choose(kernel, CPU, torch.float32, 64, 128, 256, 32).resolve(64, 128))

    for fold in ("fewer", "more", "a", "b"):
        with force_plan("fold_product", fold):
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
    ask()
    assert [plan.kind for plan in seen] == ["fold_product"] * 8 + ["one_pass"] * 2
    assert [plan.fold_b for plan in seen[::2]] == [False, True, False, True, False]


def test_forced_plans_nest_and_overlap() -> None:
    def kind() -> str:
        return choice.choose("plan", CPU, torch.float32, 8, 8, 8, 4).kind

    with force_plan("one_pass"):
        with force_plan("fold_product"):
            assert kind() == "fold_product"
        assert kind() == "one_pass"
    first, second = force_plan("one_pass"), force_plan("one_pass")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # another thread's block may end before one begun later
    assert kind() == "one_pass"
    second.__exit__(None, None, None)


def test_a_plans_table_decides_for_the_operator() -> None:
    key = Key("plan", "fp32", 16, 4, 4, 8)
    a, b, metric = torch.randn(1, 5, 16), torch.randn(1, 7, 16), Metric(None, torch.randn(4, 4, 4))
    assert bilinear._plan(a, b, metric, False).kind == "one_pass"
    # Gradients of normalised rows take what one pass does not keep, but where it is told to.
    assert bilinear._plan(a, b, metric, True).kind == "fold_product"
    with force_plan("one_pass"):
        assert bilinear._plan(a, b, metric, True).kind == "one_pass"
    lookup.learn(identify(CPU), {key: measured(PlanChoice("fold_product", "more"))})
    plan = bilinear._plan(a, b, metric, False)
    assert (plan.kind, plan.fold_b) == ("fold_product", True)


# ------------------------------------------------------------------------------------------------- devices and memory


def test_tables_belong_to_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of different kinds in one process, each with its own."""
    tiles = {H100: PairwiseConfig(64, 128, 64, 4, 3), OTHER_GPU: PairwiseConfig(64, 64, 64, 4, 3)}
    for device, tile in tiles.items():
        with pretend(monkeypatch, device):
            lookup.learn(device, {Key("pairwise", "bf16", 256, 64, 1024, 1024): measured(tile)})
    found = {}
    monkeypatch.setattr(devices, "identify", lambda where: list(tiles)[where.index])
    for index, device in enumerate(tiles):
        where = torch.device("cuda", index)
        found[device] = choice.choose("pairwise", where, torch.bfloat16, 1000, 1000, 256, 64)
    assert found == tiles


def test_the_number_of_threads_is_part_of_a_cpus_key() -> None:
    lookup.learn(Device("cpu-3", identify_for_torch(CPU).name, "cpu"), {stream_key(): CHUNK})
    before = torch.get_num_threads()
    assert chunk() == chunk_config("cpu")
    try:
        torch.set_num_threads(3)
        assert chunk() == CHUNK.config
    finally:
        torch.set_num_threads(before)
    assert chunk() == chunk_config("cpu")


def test_precision_is_part_of_what_is_remembered() -> None:
    lookup.learn(identify_for_torch(CPU), {stream_key(): CHUNK})
    assert chunk() == CHUNK.config
    torch.set_float32_matmul_precision("high")
    assert chunk() == chunk_config("cpu"), "TF32 is other numerics"


def test_a_remembered_answer_costs_no_look_at_any_table(monkeypatch: pytest.MonkeyPatch) -> None:
    first = chunk()
    monkeypatch.setattr(choice, "_find", lambda call: pytest.fail("looked up twice"))
    assert chunk() == first


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MOST_REMEMBERED", 10)
    for rows in range(1, 50):
        chunk(rows)
        assert len(choice._remembered) <= 10


def test_a_damaged_table_of_the_package_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gssf_triton.autotune import tables

    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    with pytest.warns(UserWarning, match=r"x\.json.*going on with the model"):
        assert chunk() == chunk_config("cpu")


def test_empty_matrices_ask_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "entries_for", lambda device: pytest.fail("a table was looked at"))
    for M, N, D in ((0, 5, 8), (5, 0, 8), (5, 5, 0)):
        for kernel in ("plan", "product"):
            choice.choose(kernel, CPU, torch.float32, M, N, D)


def test_stream_chunks_can_be_asked_for_inside_a_compiled_function() -> None:
    """With the model's chunk: a tracer cannot follow a look into a file."""
    torch._dynamo.reset()

    def sums(a: torch.Tensor) -> torch.Tensor:
        return a.sum() * stream_chunk(a.shape[0], a.shape[0], a.shape[1], a.dtype, a.device).rows

    lookup.learn(identify_for_torch(CPU), {stream_key(): CHUNK})
    a = torch.ones(4096, 256)
    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    assert compiled(a) == a.sum() * chunk_config("cpu").rows
    assert sums(a) == a.sum() * 512
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- launchers


def _calls(where: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Kernel → a call that launches it, of 40 channels."""
    x, y = (torch.randn(rows, 40, device=where) for rows in (20, 30))
    regions, words = torch.randn(3, 7, 40, device=where), torch.randn(2, 5, 40, device=where)
    W, ids = torch.rand(40, device=where), torch.arange(30, device=where) % 7
    stream = {"logit_scale": 2.0, "backend": "triton"}
    return {
        "stream": lambda: gssf_triton.info_nce(x, y[:20], W, **stream),
        "stream_teacher": lambda: gssf_triton.distillation_loss(
            x, y[:20], W, teacher_a=x, teacher_b=y[:20], teacher_W_diag=W, **stream
        ),
        "ranked": lambda: torch.cat(
            (
                gssf_triton.topk(x, y, W, k=3, backend="triton")[0].flatten(),
                gssf_triton.ranks(x, y, W, query_ids=ids[:20], gallery_ids=ids, backend="triton").float(),
            )
        ),
        "late_interaction": lambda: gssf_triton.late_interaction(regions, words, W, backend="triton"),
        "cross_attention": lambda: gssf_triton.cross_attention_sim(regions, words, W, backend="triton"),
    }


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", EPILOGUE_KERNELS)
def test_launchers_take_what_a_table_says(kernel: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.device(device, 0) if device == "cuda" else CPU
    M, N = {"late_interaction": (7, 5), "cross_attention": (7, 5)}.get(kernel, (20, 20))
    key = make_key(kernel, "fp32", M, N, 40, 0)
    target = identify(where)
    answers: list[Any] = []
    choose: Callable[..., Any] = choice.choose

    def recorded(asked: str, *arguments: Any, **further: Any) -> Any:
        answer = choose(asked, *arguments, **further)
        if asked == kernel:
            answers.append(answer)
        return answer

    monkeypatch.setattr(choice, "choose", recorded)
    call = _calls(where)[kernel]
    expected = call()
    first, other = candidates(key, target.arch)[:2]
    assert answers and set(answers) == {first}
    lookup.learn(target, {key: measured(other)})
    answers.clear()
    torch.testing.assert_close(call(), expected)
    assert answers and set(answers) == {other}


@pytest.mark.kernels
def test_a_losses_tile_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows must have equal similarities in every part of S, the last and smaller one included."""
    asked: list[tuple[int, int]] = []
    choose: Callable[..., Any] = choice.choose

    def recorded(kernel: str, where: torch.device, dtype: torch.dtype, *shape: int, **more: Any) -> Any:
        if kernel == "stream":
            asked.append(shape[:2])
        return choose(kernel, where, dtype, *shape, **more)

    monkeypatch.setattr(choice, "choose", recorded)
    x = torch.randn(70, 16, requires_grad=True)
    with choice.use(chunk=ChunkConfig(32, 32)):
        gssf_triton.info_nce(x, x, torch.ones(16), logit_scale=1.0, backend="triton").backward()
    assert asked == [(70, 70)] * 2
