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
from gssf_triton.autotune import lookup, mode, tuner
from gssf_triton.autotune.chunk import stream_chunk
from gssf_triton.autotune.keys import Key, make_key
from gssf_triton.autotune.model import EPILOGUE_KERNELS
from gssf_triton.autotune.ranking import candidates
from gssf_triton.kernels.configs import ChunkConfig, PairwiseConfig, chunk_config, pairwise_config
from gssf_triton.kernels.devices import Device, identify_for_torch
from gssf_triton.kernels.plans import PLANS, PlanChoice, force_plan
from gssf_triton.similarity import bilinear

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
    mode._complain.cache_clear()
    with pytest.warns(UserWarning, match="GSSF_AUTOTUNE must be one of off, cached, on, got 'sometimes'") as warned:
        assert mode.mode() == mode.mode() == "cached"
    assert len(warned) == 1


def test_the_interpreter_is_tuned_only_when_asked(tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    lookup.rows(64, 64, 8, torch.float32, CPU, kernel="fold")
    assert not tuned_keys
    lookup.forget()
    monkeypatch.setenv("GSSF_AUTOTUNE_INTERPRETER", "1")
    lookup.rows(64, 64, 8, torch.float32, CPU, kernel="fold")
    assert tuned_keys == [Key("fold", "fp32", 64, 8, 64, 0)]


# -------------------------------------------------------------------------------------- moments at which never to tune


def test_nothing_is_tuned_while_a_graph_is_captured(tuned_keys: list[Key], monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture gets the model's choice; the first call after it tunes."""
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(mode, "is_capturing", lambda where: torch.cuda.is_current_stream_capturing())
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
    assert mode.is_capturing(torch.device("cuda", 1)) and not mode.is_capturing(CPU)
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
        moments.append(mode.is_tracing())
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
        with lookup.use("plan", PlanChoice(kind, "more")):
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
        with lookup.use("plan", PlanChoice(kind, fold)):
            S = gssf_triton.pairwise_sim(*tensors, normalize=normalize, backend="triton")
        torch.testing.assert_close(S, reference, rtol=1e-4, atol=1e-4)
        grads = (torch.autograd.grad(x, tensors, dS) for x in (S, reference))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_forced_plan_reaches_threads_that_inherit_no_context() -> None:
    """As those of autograd's backward pass on a GPU."""
    seen: list[Any] = []

    def ask() -> None:
        seen.append(lookup.plan(1, 512, 8192, 256, 32, torch.float32, CPU))

    for fold_b in (None, True):
        with force_plan("fold_own_product", fold_b):
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
    ask()
    assert [plan.kind for plan in seen[:2]] == ["fold_own_product"] * 2
    assert [plan.fold_b for plan in seen] == [False, True, False]
    assert seen[2].kind != "fold_own_product"


def test_forced_plans_nest_and_overlap() -> None:
    def kind() -> str:
        return lookup.plan(1, 8, 8, 8, 4, torch.float32, CPU).kind

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


def test_a_plans_table_decides_for_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key("plan", "fp32", 16, 4, 4, 8)
    lookup.learn(lookup.identify(CPU), {key: measured(PlanChoice("fold_own_product", "more"))})
    a, b = torch.randn(1, 5, 16), torch.randn(1, 7, 16)
    plan = bilinear._plan(a, b, torch.randn(4, 4, 4), normalize=False)
    assert (plan.kind, plan.fold_b) == ("fold_own_product", True)


# ------------------------------------------------------------------------------------------------- devices and memory


def test_tables_belong_to_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of different kinds in one process, each with its own."""
    tiles = {H100: PairwiseConfig(64, 128, 64, 4, 3), OTHER_GPU: PairwiseConfig(64, 64, 64, 4, 3)}
    for device, tile in tiles.items():
        with pretend(monkeypatch, device):
            lookup.learn(device, {Key("pairwise", "bf16", 256, 64, 1024, 1024): measured(tile)})
    found = {}
    monkeypatch.setattr(lookup, "identify", lambda where: list(tiles)[where.index])
    for index, device in enumerate(tiles):
        where = torch.device("cuda", index)
        found[device] = lookup.tile(1000, 1000, 256, 64, torch.bfloat16, where, kernel="pairwise", batch=1)
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


def test_precision_and_determinism_are_part_of_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from gssf_triton.autotune import space

    chancy = replace(space.SPACES["chunk"], is_deterministic=lambda config: config != CHUNK.config)
    monkeypatch.setitem(space.SPACES, "chunk", chancy)
    lookup.learn(identify_for_torch(CPU), {stream_key(): CHUNK})
    assert chunk() == CHUNK.config
    torch.use_deterministic_algorithms(True)
    try:
        assert chunk() == chunk_config("cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert chunk() == CHUNK.config
    torch.set_float32_matmul_precision("high")
    assert chunk() == chunk_config("cpu"), "TF32 is other numerics"


def test_a_remembered_answer_costs_no_look_at_any_table(monkeypatch: pytest.MonkeyPatch) -> None:
    first = chunk()
    monkeypatch.setattr(lookup, "_resolve", lambda *args: pytest.fail("resolved twice"))
    assert chunk() == first


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MOST_REMEMBERED", 10)
    for rows in range(1, 50):
        chunk(rows)
        assert len(lookup._remembered) <= 10


def test_a_damaged_table_of_the_package_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gssf_triton.autotune import tables

    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    with pytest.warns(UserWarning, match=r"x\.json.*going on with the model"):
        assert chunk() == chunk_config("cpu")


def test_a_table_that_ships_serves_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend(monkeypatch, H100):
        config = lookup.tile(8192, 8192, 1024, 32, torch.bfloat16, CPU, kernel="pairwise", batch=1)
        assert config == pairwise_config(8192, 8192, 1024, 32, torch.bfloat16, "sm_90")
        assert lookup.entries_for(H100)
    with pretend(monkeypatch, OTHER_GPU):
        assert not lookup.entries_for(OTHER_GPU)


def test_empty_matrices_ask_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "entries_for", lambda device: pytest.fail("a table was looked at"))
    for M, N, D in ((0, 5, 8), (5, 0, 8), (5, 5, 0)):
        lookup.plan(1, M, N, D, 0, torch.float32, CPU)
        lookup.tile(M, N, D, 0, torch.float32, CPU, kernel="product", batch=1)


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
    target = lookup.identify(where)
    answers: list[Any] = []
    choose = lookup.choose

    def recorded(asked: str, *arguments: Any, **further: Any) -> Any:
        answer = choose(asked, *arguments, **further)
        if asked == kernel:
            answers.append(answer)
        return answer

    monkeypatch.setattr(lookup, "choose", recorded)
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
    """Equal rows must have equal similarities in every chunk, the last and smaller one included."""
    asked: list[tuple[int, int]] = []
    stream = lookup.stream

    def recorded(M: int, N: int, *arguments: Any, **further: Any) -> Any:
        asked.append((M, N))
        return stream(M, N, *arguments, **further)

    monkeypatch.setattr(lookup, "stream", recorded)
    x = torch.randn(70, 16)
    with lookup.use("chunk", ChunkConfig(32, 32)):
        gssf_triton.info_nce(x, x, torch.ones(16), logit_scale=1.0, backend="triton")
    assert len(asked) == 9 and set(asked) == {(70, 70)}
