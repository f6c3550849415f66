"""The similarity in sentence-transformers' own losses and evaluators, on a small random model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, RerankingEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from support import reference
from support.reference import assert_close, features, tolerance
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from gssf_triton.integrations.sentence_transformers import FusedRankingLoss, GSSFSimilarity, PairwiseSimilarity

DIM, BLOCK = 24, 8
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture
def model() -> SentenceTransformer:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    embedding = StaticEmbedding(tokenizer, embedding_dim=DIM)
    with torch.no_grad():
        for weight in embedding.parameters():
            weight.normal_()
    return SentenceTransformer(modules=[embedding], device="cpu")


def sentences(n: int) -> list[str]:
    return [" ".join(np.random.default_rng().choice(WORDS, 5)) for _ in range(n)]


def trained() -> GSSFSimilarity:
    similarity = GSSFSimilarity(DIM, BLOCK)
    with torch.no_grad():
        for weight in similarity.parameters():
            weight.normal_()
    return similarity


def exact(similarity: GSSFSimilarity, a: Any, b: Any) -> torch.Tensor:
    metric = similarity.W_diag.detach().double(), similarity.W_blocks.detach().double()
    return reference.pairwise_sim(torch.as_tensor(a).double(), torch.as_tensor(b).double(), *metric, normalize=True)


def test_called_as_cos_sim() -> None:
    """Tensors, arrays, lists, a single embedding; at the start with the same result."""
    a, b = features(4, DIM), features(6, DIM)
    start, similarity = GSSFSimilarity(DIM, BLOCK), trained()
    forms: list[tuple[Any, Any]] = [(a, b), (a.numpy(), b.numpy()), (list(a), b.tolist()), (a[0], b), (a.numpy(), b[2])]
    for x, y in forms:
        rows = [torch.as_tensor(np.stack([np.asarray(row) for row in z])).reshape(-1, DIM) for z in (x, y)]
        # Of the rows: a list of tensors is more than cos_sim takes in every release.
        torch.testing.assert_close(start(x, y), util.cos_sim(*(z.float() for z in rows)), rtol=1e-5, atol=1e-6)
        assert_close(similarity(x, y), exact(similarity, *rows), tolerance(torch.float32))
    assert_close(
        PairwiseSimilarity(similarity)(a, b[:4]), exact(similarity, a, b[:4]).diagonal(), tolerance(torch.float32)
    )
    scored = similarity.score(a, b)
    assert not scored.requires_grad and torch.equal(scored, similarity(a, b))


def test_arrays_that_pytorch_takes_in_no_memory_of_its_own() -> None:
    """Of another byte order, backwards, read-only: alone and as rows of a list."""
    similarity, a, b = trained(), features(4, DIM), features(6, DIM)
    expected, x, y = similarity(a, b), a.numpy(), b.numpy()
    fixed = x.copy()
    fixed.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in (x.astype(">f4"), x[::-1].copy()[::-1], fixed, np.asfortranarray(x), list(x.astype(">f4"))):
            torch.testing.assert_close(similarity(form, y), expected)
        backwards = [row[::-1].copy()[::-1] for row in y]
        torch.testing.assert_close(similarity(x[:, ::-1].copy()[:, ::-1], backwards), expected)
        whole = np.arange(DIM).astype(">i8")
        torch.testing.assert_close(similarity(whole, y), similarity(torch.arange(DIM), b))
    with pytest.raises(ValueError, match="a must hold embeddings of one length, got a ndarray"):
        similarity(np.array([["text"] * DIM]), b)


def columns(model: SentenceTransformer, count: int, n: int = 6) -> list[dict[str, torch.Tensor]]:
    return [model.tokenize(sentences(n)) for _ in range(count)]


RANKING: dict[str, Any] = {
    "one-way": lambda model, fct: losses.MultipleNegativesRankingLoss(model, similarity_fct=fct),
    "all-ways": lambda model, fct: losses.MultipleNegativesRankingLoss(
        model, similarity_fct=fct, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    ),
    "symmetric": lambda model, fct: losses.MultipleNegativesRankingLoss(
        model, similarity_fct=fct, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ),
}


@pytest.mark.parametrize("name", RANKING)
def test_ranking_losses(name: str, model: SentenceTransformer) -> None:
    """The cosine's loss at the start; the metric's parameters are the loss's own and learn."""
    batch, similarity = columns(model, 2), GSSFSimilarity(DIM, BLOCK)
    ours, theirs = RANKING[name](model, similarity), RANKING[name](model, util.cos_sim)
    labels = torch.zeros(6)
    loss = ours(batch, labels)
    torch.testing.assert_close(loss, theirs(batch, labels), rtol=1e-5, atol=1e-6)
    assert {id(p) for p in similarity.parameters()} <= {id(p) for p in ours.parameters()}
    loss.backward()
    assert similarity.W_diag.grad.any() and similarity.W_blocks.grad.any()
    assert "GSSFSimilarity" in str(ours.get_config_dict()["similarity_fct"])


def test_ranking_loss_with_hard_negatives_under_a_trained_metric(model: SentenceTransformer) -> None:
    batch, similarity = columns(model, 3), trained()
    loss = losses.MultipleNegativesRankingLoss(model, similarity_fct=similarity, scale=5.0)(batch, torch.zeros(6))
    anchors, *documents = (model(column)["sentence_embedding"].detach() for column in batch)
    S = 5.0 * exact(similarity, anchors, torch.cat(documents))
    expected = torch.nn.functional.cross_entropy(S, torch.arange(6))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_loss_over_pairs(model: SentenceTransformer) -> None:
    batch, similarity, labels = columns(model, 2), GSSFSimilarity(DIM, BLOCK), torch.rand(6)
    ours = losses.CoSENTLoss(model, similarity_fct=PairwiseSimilarity(similarity))
    torch.testing.assert_close(ours(batch, labels), losses.CoSENTLoss(model)(batch, labels), rtol=1e-5, atol=1e-5)
    ours(batch, labels).backward()
    assert similarity.W_blocks.grad.any() and ours.get_config_dict()["similarity_fct"] == "PairwiseSimilarity"


def test_training_steps_lower_the_loss(model: SentenceTransformer) -> None:
    similarity, batch = GSSFSimilarity(DIM, BLOCK), columns(model, 2, n=16)
    model.requires_grad_(False)
    loss_func = losses.MultipleNegativesRankingLoss(model, similarity_fct=similarity)
    optimizer = torch.optim.Adam([p for p in loss_func.parameters() if p.requires_grad], lr=0.02)
    first = loss_func(batch, torch.zeros(16)).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_func(batch, torch.zeros(16))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


def test_evaluators_score_with_the_metric(model: SentenceTransformer) -> None:
    similarity = trained()
    queries = {f"q{i}": text for i, text in enumerate(sentences(8))}
    corpus = {f"d{i}": text for i, text in enumerate(sentences(30))}
    relevant = {f"q{i}": {f"d{i}"} for i in range(8)}
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, relevant, score_functions={"gssf": similarity.score, "cosine": util.cos_sim}, write_csv=False
    )
    found = evaluator(model)
    S = exact(similarity, model.encode(list(queries.values())), model.encode(list(corpus.values())))
    for k in (1, 3, 10):
        hits = (S.topk(k).indices == torch.arange(8)[:, None]).any(1).double().mean().item()
        assert found[f"gssf_accuracy@{k}"] == pytest.approx(hits)
    samples = [
        {"query": text, "positive": [corpus[f"d{i}"]], "negative": [corpus[f"d{i + 8}"], corpus[f"d{i + 16}"]]}
        for i, text in enumerate(queries.values())
    ]
    places = torch.stack([S[i, [i, i + 8, i + 16]] for i in range(8)])
    ranks = 1 + (places[:, 1:] > places[:, :1]).sum(1)
    reranked = RerankingEvaluator(samples, similarity_fct=similarity.score, write_csv=False)(model)
    assert reranked["map"] == pytest.approx((1 / ranks).mean().item())


def test_semantic_search(model: SentenceTransformer) -> None:
    similarity = trained()
    queries, corpus = model.encode(sentences(3)), model.encode(sentences(20))
    found = util.semantic_search(queries, corpus, top_k=4, score_function=similarity.score)
    expected = exact(similarity, queries, corpus).topk(4).indices.tolist()
    assert [[hit["corpus_id"] for hit in hits] for hits in found] == expected


def test_fused_loss_mistakes(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="scale must be positive and finite, got 0"):
        FusedRankingLoss(model, GSSFSimilarity(DIM, BLOCK), scale=0)
