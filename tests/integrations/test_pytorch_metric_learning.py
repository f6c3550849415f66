"""The distance in pytorch-metric-learning's own losses and miners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import BatchedDistance, CosineSimilarity
from pytorch_metric_learning.utils.inference import MatchFinder
from support import reference
from support.reference import assert_close, features, tolerance

from gssf_triton.integrations.pytorch_metric_learning import GSSFKNN, GSSFDistance

DIM, BLOCK = 24, 8
LABELS = torch.arange(4).repeat_interleave(3)

#: Losses that take any distance, and with which margins where a large value means near.
LOSSES: dict[str, Any] = {
    "triplet": lambda distance: losses.TripletMarginLoss(distance=distance, swap=True),
    "contrastive": lambda distance: losses.ContrastiveLoss(pos_margin=1, neg_margin=0, distance=distance),
    "multi-similarity": lambda distance: losses.MultiSimilarityLoss(distance=distance),
    "ntxent": lambda distance: losses.NTXentLoss(distance=distance),
    "supcon": lambda distance: losses.SupConLoss(distance=distance),
    "lifted": lambda distance: losses.GeneralizedLiftedStructureLoss(distance=distance),
    "ranked-list": lambda distance: losses.NCALoss(distance=distance),
    "proxy-anchor": lambda distance: losses.ProxyAnchorLoss(4, DIM, distance=distance),
    "memory": lambda distance: losses.CrossBatchMemory(losses.NTXentLoss(distance=distance), DIM, memory_size=24),
}


def trained(**options: Any) -> GSSFDistance:
    distance = GSSFDistance(DIM, BLOCK, **options)
    with torch.no_grad():
        for weight in distance.parameters():
            weight.normal_()
    return distance


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "as-is"])
def test_matrix_and_pairs(symmetric: bool, normalize: bool) -> None:
    distance = trained(symmetric=symmetric, normalize_embeddings=normalize)
    a, b = features(7, DIM), features(5, DIM)
    metric = {"W_diag": distance.metric.W_diag.double(), "W_blocks": distance.metric.W_blocks.double()}
    wide = a.double(), b.double()
    expected = reference.pairwise_sim(*wide, **metric, normalize=normalize)
    if symmetric:
        expected = (expected + reference.pairwise_sim(*wide[::-1], **metric, normalize=normalize).T) / 2
    assert distance.is_inverted
    assert_close(distance(a, b), expected, tolerance(torch.float32))
    a_unit, b_unit = distance.maybe_normalize(a[:5]), distance.maybe_normalize(b)
    assert_close(distance.pairwise_distance(a_unit, b_unit), expected[:5].diagonal(), tolerance(torch.float32))
    itself = distance(a)
    assert torch.allclose(itself, itself.T, atol=1e-4) == symmetric


def test_power_and_statistics() -> None:
    distance = trained(power=2, collect_stats=True)
    a, b = features(4, DIM), features(5, DIM)
    squared = distance(a, b)
    distance.power = 1
    assert_close(squared, distance(a, b).double() ** 2, tolerance(torch.float32))
    assert distance.final_avg_query_norm == pytest.approx(1)


@pytest.mark.parametrize("name", LOSSES)
def test_starts_as_cosine_in_every_loss_and_learns(name: str) -> None:
    x = features(12, DIM).requires_grad_()
    torch.manual_seed(3)  # proxies are drawn when the loss is made
    ours = LOSSES[name](GSSFDistance(DIM, BLOCK))
    torch.manual_seed(3)
    theirs = LOSSES[name](CosineSimilarity())
    loss, expected = ours(x, LABELS), theirs(x, LABELS)
    (gradient,) = torch.autograd.grad(expected, x)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-6)
    metric = [p for key, p in ours.named_parameters() if "metric" in key]
    assert len(metric) == 2 and all(p.grad is not None and p.grad.any() for p in metric)


@pytest.mark.parametrize(
    "miner",
    [miners.MultiSimilarityMiner, miners.BatchHardMiner, miners.TripletMarginMiner, miners.BatchEasyHardMiner],
    ids=lambda miner: miner.__name__,
)
def test_miners(miner: Any) -> None:
    """At the start they mine what they mine under the cosine; trained, something else, and a loss takes it."""
    x = features(12, DIM)
    indices = miner(distance=GSSFDistance(DIM, BLOCK))(x, LABELS)
    for ours, theirs in zip(indices, miner(distance=CosineSimilarity())(x, LABELS), strict=True):
        assert torch.equal(ours, theirs)
    distance = trained()
    mined = miner(distance=distance)(x, LABELS)
    loss = losses.TripletMarginLoss(distance=distance)(x, LABELS, mined)
    assert torch.isfinite(loss)


def test_hardest_negative_is_the_metrics() -> None:
    x, distance = features(12, DIM), trained()
    anchors, _, negatives = miners.BatchHardMiner(distance=distance)(x, LABELS)
    S = distance(x).masked_fill(LABELS[:, None] == LABELS, -torch.inf)
    assert torch.equal(negatives, S[anchors].argmax(1))


def test_the_query_is_the_left_side() -> None:
    """In batches, in a loss with reference embeddings, in matching."""
    distance, a, b = trained(), features(6, DIM), features(9, DIM)
    rows = {}
    BatchedDistance(distance, iter_fn=lambda mat, s, e: rows.update({s: mat}), batch_size=4)(a, b)
    assert_close(torch.cat([rows[0], rows[4]]), distance(a, b).double(), tolerance(torch.float32))
    assert not torch.allclose(distance(a, b), distance(b, a).T, atol=1e-2)
    labels_a, labels_b = torch.arange(6) % 3, torch.arange(9) % 3
    loss = losses.NTXentLoss(distance=distance)(a, labels_a, ref_emb=b, ref_labels=labels_b)
    logits = distance(a, b).double() / 0.07
    same = labels_a[:, None] == labels_b
    terms = [
        -(logits[i, j] - torch.logsumexp(torch.cat([logits[i, j][None], logits[i][~same[i]]]), 0))
        for i, j in same.nonzero().tolist()
    ]
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    finder = MatchFinder(distance, threshold=0.3)
    assert (torch.from_numpy(finder.get_matching_pairs(a, b)) == (distance(a, b) >= 0.3)).all()


def test_references_in_arrays_of_any_kind() -> None:
    distance, query, x = trained(), features(3, DIM), features(9, DIM).numpy()
    expected = GSSFKNN(distance)(query, 2, torch.from_numpy(x))
    index = GSSFKNN(distance)
    index.train(x[:5].astype(">f4"))
    index.add(x[5:][::-1].copy()[::-1])
    for found, wanted in zip(index(query, 2), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_copies_and_state() -> None:
    distance = trained()
    other = GSSFDistance(DIM, BLOCK)
    other.load_state_dict(distance.state_dict())
    a, b = features(4, DIM), features(5, DIM)
    assert torch.equal(other(a, b), distance(a, b)) and torch.equal(copy.deepcopy(distance)(a, b), distance(a, b))
    assert GSSFDistance(DIM, diag=False, block_size=4).metric.W_diag is None
    with pytest.raises(ValueError, match="block_size"):
        GSSFDistance(DIM)
    with pytest.raises(ValueError, match="2D"):
        distance(features(2, 3, DIM))


#: Losses with a distance of their own, and what else they want.
REFUSING: dict[str, dict[str, Any]] = {
    "AngularLoss": {},
    "CircleLoss": {},
    "DynamicSoftMarginLoss": {},
    "FastAPLoss": {},
    "InstanceLoss": {},
    "LargeMarginSoftmaxLoss": {"num_classes": 4, "embedding_size": DIM},
    "PNPLoss": {},
    "SignalToNoiseRatioContrastiveLoss": {},
    "SmoothAPLoss": {},
    "ThresholdConsistentMarginLoss": {},
    "TupletMarginLoss": {},
}


@pytest.mark.parametrize("name", REFUSING)
def test_losses_that_refuse_any_distance_but_their_own(name: str) -> None:
    """Those that the docstring names; the subclasses of one of them beside it."""
    kind = getattr(losses, name)
    with pytest.raises(AssertionError, match=f"{name} requires the distance metric to be"):
        kind(**REFUSING[name], distance=GSSFDistance(DIM, BLOCK))
    kinds = [other for other, of in vars(losses).items() if isinstance(of, type) and issubclass(of, kind)]
    assert GSSFDistance.__doc__ is not None and all(f"`{other}`" in GSSFDistance.__doc__ for other in kinds)


def test_losses_that_use_no_distance() -> None:
    distance, x = GSSFDistance(DIM, BLOCK), features(12, DIM)
    with pytest.raises(ValueError, match="cannot use a distance"):
        losses.VICRegLoss(distance=distance)
    loss = losses.P2SGradLoss(descriptors_dim=DIM, num_classes=4, distance=distance)(x, LABELS)
    loss.backward()
    assert all(weight.grad is None for weight in distance.parameters())
