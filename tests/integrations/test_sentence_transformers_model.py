"""The metric as a module of the model, in the loop of the library's Trainer: wrapped, accumulated, cached, saved.

The Trainer itself needs accelerate. What it does is few lines: it puts the wrapped model into the loss
(`override_model_in_loss`), divides every loss by the steps of accumulation, and synchronises at the last of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import real_torchvision  # noqa: F401 (in the processes too)
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.modules import InputModule
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.sentence_transformer import losses
from support.gloo import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gssf_triton.integrations.sentence_transformers import FusedRankingLoss, GSSFSimilarity
from gssf_triton.integrations.sentence_transformers_model import QueryMetric

DIM, BLOCK, ROWS, STEPS, WORLD = 8, 4, 6, 4, 2


class Numbers(InputModule):
    """A "text" is a few numbers, and its embedding a linear map of them."""

    config_keys: list[str] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, DIM)

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[float(word) for word in text.split()] for text in inputs])}

    tokenize = preprocess

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        return features | {"sentence_embedding": self.linear(features["input_ids"])}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Numbers:
        return cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=cls())


def make(seed: int = 0) -> SentenceTransformer:
    torch.manual_seed(seed)
    metric = QueryMetric(DIM, BLOCK)
    with torch.no_grad():
        for weight in metric.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return SentenceTransformer(modules=[Numbers(), metric], device="cpu", similarity_fn_name="dot")


def texts(count: int) -> list[str]:
    return [" ".join(f"{x:.4f}" for x in row) for row in torch.randn(count, 5).tolist()]


def batches(model: SentenceTransformer, seed: int) -> Iterator[list[dict[str, Any]]]:
    """What the Trainer's collator and `collect_features` make of rows."""
    torch.manual_seed(seed)
    mapping = {"anchor": "query", "positive": "document"}
    collate = BaseDataCollator(preprocess_fn=model.preprocess, router_mapping=mapping)
    for _ in range(STEPS):
        rows = [{"anchor": a, "positive": b} for a, b in zip(texts(ROWS), texts(ROWS), strict=True)]
        features, _labels = BaseTrainer.collect_features(None, collate(rows))
        yield features


def exact(seeds: list[int]) -> dict[str, Tensor]:
    """The gradients of the mean loss over all batches of all processes, in float64, from the formula."""
    model = make().double()
    numbers, metric = model[0].linear, model[1].metric
    total = torch.zeros((), dtype=torch.float64)
    for seed in seeds:
        for query, document in batches(model, seed):
            a, b = (nn.functional.normalize(numbers(x["input_ids"].double()), dim=1) for x in (query, document))
            W = torch.diag(metric.W_diag) + torch.block_diag(*metric.W_blocks)
            total = total + nn.functional.cross_entropy(20.0 * a @ W @ b.T, torch.arange(ROWS))
    (total / (len(seeds) * STEPS)).backward()
    return {name: x.grad for name, x in model.named_parameters()}


LOSSES = {
    "plain": lambda model: losses.MultipleNegativesRankingLoss(model, similarity_fct=util.dot_score),
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(
        model, similarity_fct=util.dot_score, mini_batch_size=4
    ),
}


def accumulate(loss: Any, wrapped: Any, seed: int) -> None:
    """One step of the optimizer as the Trainer makes it, but for the step itself."""
    for number, features in enumerate(batches(getattr(wrapped, "module", wrapped), seed)):
        alone = wrapped.no_sync() if hasattr(wrapped, "no_sync") and number < STEPS - 1 else nullcontext()
        with alone:
            (loss(features, None) / STEPS).backward()


def assert_gradients(model: nn.Module, seeds: list[int], what: str) -> None:
    wanted = exact(seeds)
    assert set(wanted) == {name for name, _ in model.named_parameters()}
    for name, x in model.named_parameters():
        error = (x.grad.double() - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-5, f"{what}: {name} is off by {error:.2g}"


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_gradients(name: str) -> None:
    model = make().train()
    accumulate(LOSSES[name](model), model, 7)
    assert_gradients(model, [7], name)


def _averaged(rank: int) -> None:
    for name, make_loss in LOSSES.items():
        for find_unused in (False, True):
            model = make().train()
            loss = make_loss(model)
            wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
            BaseTrainer.override_model_in_loss(_Trainer(), loss, wrapped)
            for _ in range(2):  # a second step: the first left nothing waiting
                model.zero_grad()
                accumulate(loss, wrapped, 7 + rank)
            assert_gradients(model, [7, 8], f"{name}, find_unused_parameters={find_unused}, rank {rank}")
    # In the loss it is not averaged, and that is said.
    a, b = torch.randn(2, 3, DIM)
    similarity = GSSFSimilarity(DIM, BLOCK)
    fused = FusedRankingLoss(nn.Identity(), similarity)
    for call in (similarity, similarity.pairwise, lambda a, b: fused.compute_loss_from_embeddings([a, b])):
        with pytest.warns(UserWarning, match="not averaged over processes"):
            call(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        similarity.score(a, b)
    dist.barrier()


class _Trainer:
    override_model_in_loss = BaseTrainer.override_model_in_loss


def test_a_metric_in_a_cached_loss_is_not_divided_by_the_steps() -> None:
    """What the other module's docstring says of it, and why this one is there."""
    towers = SentenceTransformer(modules=[Numbers()], device="cpu")
    plain, cached = (GSSFSimilarity(DIM, BLOCK) for _ in range(2))
    accumulate(losses.MultipleNegativesRankingLoss(towers, similarity_fct=plain), towers, 7)
    accumulate(losses.CachedMultipleNegativesRankingLoss(towers, similarity_fct=cached, mini_batch_size=4), towers, 7)
    for ours, theirs in zip(cached.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, STEPS * theirs.grad, rtol=1e-4, atol=1e-6)


def test_gradients_over_processes() -> None:
    in_processes(WORLD, _averaged)


def test_the_model_scores_as_the_metric() -> None:
    model = make().eval()
    queries, documents = texts(3), texts(4)
    a, b = (torch.tensor([[float(x) for x in text.split()] for text in part]) for part in (queries, documents))
    numbers, metric = model[0].linear, model[1].metric
    expected = metric(numbers(a), numbers(b)).detach()
    found = model.similarity(model.encode_query(queries), model.encode_document(documents))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.encode(documents), model.encode_document(documents))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_document_is_its_embedding_whatever_the_weights_are(normalize: bool) -> None:
    """Every weight takes part, for DistributedDataParallel; its value does not."""
    module = QueryMetric(DIM, BLOCK, normalize=normalize)
    with torch.no_grad():
        module.metric.W_diag[0], module.metric.W_blocks[0, 1, 2] = torch.inf, torch.nan
    x = torch.randn(3, DIM)
    found = module({"sentence_embedding": x}, task="document")["sentence_embedding"]
    torch.testing.assert_close(found, x / x.norm(dim=1, keepdim=True) if normalize else x)
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.count_nonzero() for p in module.parameters())


class Around(nn.Module):
    """A model around one of them, which is given a dict or a list of dicts."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, query: Tensor, document: Tensor) -> Any:
        if isinstance(self.part, QueryMetric):
            return self.part({"sentence_embedding": query}, task="query")["sentence_embedding"]
        return self.part([{"input_ids": query, "task": "query"}, {"input_ids": document, "task": "document"}])


def test_fx_traces_them_inside_a_model_as_one_step() -> None:
    loss = FusedRankingLoss(make()[0], GSSFSimilarity(DIM, BLOCK))
    for part, channels in ((make()[1], DIM), (loss, 5)):
        model, inputs = Around(part), (torch.randn(3, channels), torch.randn(3, channels))
        traced = torch.fx.symbolic_trace(model)
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["part"]
        assert torch.equal(traced(*inputs), model(*inputs))


def test_a_task_is_wanted_in_training() -> None:
    module, features = QueryMetric(DIM, BLOCK), {"sentence_embedding": torch.randn(2, DIM)}
    with pytest.raises(ValueError, match=r"task must be 'query' or 'document', got None: .*router_mapping"):
        module.train()(dict(features))
    with pytest.raises(ValueError, match=r"got 'passage'"):
        module.eval()(dict(features), task="passage")


@pytest.mark.parametrize("options", [{}, {"blocks": False, "normalize": False}], ids=["both", "diag"])
def test_saved_with_the_model(options: dict[str, bool], tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[Numbers(), QueryMetric(DIM, BLOCK, **options)], device="cpu")
    with torch.no_grad():
        for weight in model[1].parameters():
            weight.normal_()
    model.save_pretrained(str(tmp_path), create_model_card=False)
    loaded = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert str(loaded[1].metric) == str(model[1].metric)
    queries = texts(3)
    assert torch.equal(*(torch.as_tensor(x.encode_query(queries)) for x in (model, loaded)))
