"""What others' libraries give for small cases that can be checked by hand: numbers of theirs, or of their formulas.

Any matrix of scores is had with the identity on one side: s(row of S, e_j) = S[·, j].
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import gssf_triton as gssf
from gssf_triton import metrics


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values)


def re_id(scores: list[float], right: list[int]) -> dict[str, float]:
    """`metrics.reid` of one query, which meets items in places `right` again, under these scores."""
    N = len(scores)
    ids = torch.tensor([int(j in right) + 1 for j in range(N)])
    return metrics.reid(
        rows(scores), torch.eye(N), torch.ones(N), query_ids=torch.tensor([2]), gallery_ids=ids, normalize=False,
        query_cams=torch.tensor([0]), gallery_cams=torch.ones(N, dtype=torch.int32), ks=(1, 2, 3),
    )  # fmt: skip


# ---------------------------------------------------------------- average precision


def test_torchreid_and_fast_reid_not_market1501s_first_evaluation() -> None:
    """Hits at 1 and 3: (1/1 + 2/3) / 2. Market-1501's script has trapezoids, (1 + 1)/4 + (1/2 + 2/3)/4 = 79.17 %."""
    found = re_id([0.9, 0.8, 0.7, 0.6], right=[0, 2])
    assert found["map"] == pytest.approx(100 * 5 / 6)
    assert found["minp"] == pytest.approx(100 * 2 / 3) and (found["cmc1"], found["cmc3"]) == (100.0, 100.0)


def test_ranx_and_trec_eval() -> None:
    """ranx's README: MAP 0.6416 and MRR 0.75 over two queries."""
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    average = (re_id(scores, right=[0, 2])["map"] + re_id(scores, right=[1, 4])["map"]) / 200
    assert average == pytest.approx(0.6416, abs=1e-4)
    queries, gallery = torch.tensor([scores, scores]), torch.eye(6)
    first = [
        gssf.ranks(q[None], gallery, torch.ones(6), query_ids=torch.tensor([1]), gallery_ids=torch.tensor(ids))
        for q, ids in zip(queries, ([1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0]), strict=True)
    ]
    assert (1 / (torch.cat(first) + 1)).mean().item() == pytest.approx(0.75)


def test_torchmetrics() -> None:
    """RetrievalMAP's example, 0.7917; RetrievalHitRate at 1 of the same."""
    first, second = re_id([0.2, 0.3, 0.5], right=[2]), re_id([0.1, 0.3, 0.5, 0.2], right=[1, 3])
    assert (first["map"] + second["map"]) / 200 == pytest.approx(0.7917, abs=1e-4)
    assert [first["cmc1"], second["cmc1"], second["cmc2"]] == [100.0, 0.0, 100.0]


# ---------------------------------------------------------------- one set


@pytest.mark.parametrize(
    ("places", "r_precision", "map_at_r"),
    [((1,), 10, 10), ((1, 10), 20, 12), ((1, 2), 20, 20), (tuple(range(1, 11)), 100, 100)],
    ids=["first", "first and tenth", "first and second", "all"],
)
def test_pytorch_metric_learnings_map_at_r(places: tuple[int, ...], r_precision: float, map_at_r: float) -> None:
    """The table of "A Metric Learning Reality Check", R = 10, for each of a class's 11 items; 10 others are alone."""
    N, R = 21, 10
    S = torch.zeros(N, N)
    for i in range(R + 1):
        matches, others = [(i + 1 + j) % (R + 1) for j in range(R)], list(range(R + 1, N))
        among_first = [matches.pop() if place in places else others.pop() for place in range(1, R + 1)]
        for place, item in enumerate(among_first + matches + others):
            S[i, item] = N - place
    labels = torch.tensor([0] * (R + 1) + list(range(1, R + 1)))
    found = metrics.retrieval(torch.eye(N), labels, W_blocks=S[None], ks=(1,), normalize=False)
    assert found["r_precision"] == pytest.approx(r_precision) and found["map_at_r"] == pytest.approx(map_at_r)
    # Items whose label nobody shares are misses of Recall@K and in no other number; PML leaves them out of all.
    assert found["r1"] == pytest.approx(100 * (R + 1) / N)


# ---------------------------------------------------------------- image and text


def test_vse_recalls_and_ranks() -> None:
    """Best captions in places 0, 3, 5 and 12: R@1, 5, 10 of 25, 50, 75; median floor(4) + 1, mean 5 + 1."""
    S = torch.zeros(4, 20)
    for image, better in enumerate((0, 3, 5, 12)):
        own = list(range(5 * image, 5 * image + 5))
        others = [caption for caption in range(20) if caption not in own]
        S[image, others[:better]], S[image, own[2]], S[image, others[better:]] = 3.0, 2.0, 1.0
    ids = torch.arange(4)
    found = metrics.image_text(
        S, torch.eye(20), torch.ones(20), image_ids=ids, text_ids=ids.repeat_interleave(5), normalize=False
    )
    assert [found[f"i2t_r{k}"] for k in (1, 5, 10)] == [25.0, 50.0, 75.0]
    assert (found["i2t_medr"], found["i2t_meanr"]) == (5.0, 6.0)
    # VSE++'s t2i: where each caption's image stands in its column, sorted (here with the lower index first).
    order = np.argsort(-S.numpy().T, axis=1, kind="stable")
    places = np.array([order[caption].tolist().index(caption // 5) for caption in range(20)])
    assert found["t2i_r1"] == 100 * (places < 1).mean() and found["t2i_meanr"] == places.mean() + 1
    assert found["t2i_medr"] == np.floor(np.median(places)) + 1


def unit(x: np.ndarray) -> np.ndarray:
    norms: np.ndarray = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / norms


def scan_attention(query: np.ndarray, context: np.ndarray, smooth: float) -> float:
    """SCAN's xattn_score with clipped_l2norm and AVG, of one pair: each row of `query` attends to `context`."""
    attention = unit(context) @ unit(query).T  # (context rows, query rows)
    attention = np.where(attention > 0, attention, 0.1 * attention)
    attention = attention / (np.linalg.norm(attention, axis=1, keepdims=True) + 1e-8)
    weights = np.exp(smooth * attention)
    weights /= weights.sum(axis=0)
    mixed = unit(weights.T @ unit(context))
    return float((mixed * unit(query)).sum(-1).mean())


def test_scan_both_ways() -> None:
    """Text to image as it is; image to text with the sides swapped and the blocks transposed."""
    generator = torch.Generator().manual_seed(0)
    images, captions = (torch.randn(n, r, 8, generator=generator) for n, r in ((2, 5), (3, 4)))
    W_diag, W_blocks = torch.ones(8), torch.zeros(2, 4, 4)
    t2i = gssf.cross_attention_sim(images, captions, W_diag, W_blocks, smooth=9.0)
    i2t = gssf.cross_attention_sim(captions, images, W_diag, W_blocks.mT, smooth=4.0).T
    wide = [[x.double().numpy() for x in side] for side in (images, captions)]
    expected = [[scan_attention(caption, image, 9.0) for caption in wide[1]] for image in wide[0]]
    assert t2i.numpy() == pytest.approx(np.array(expected), abs=1e-5)
    expected = [[scan_attention(image, caption, 4.0) for caption in wide[1]] for image in wide[0]]
    assert i2t.numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_colbert_maxsim() -> None:
    """A query's words [1, 0] and [0, 1] find 0.9 and 0.8; without the document's second row 0.9 and 0.5."""
    document, query = rows([0.9, 0.1], [0.2, 0.8], [0.5, 0.5])[None], torch.eye(2)[None]
    score = gssf.late_interaction(document, query, torch.ones(2), pooling="max-sum")
    assert score.item() == pytest.approx(1.7)
    for mask, expected in (([True, False, True], 1.4), ([False, False, False], 0.0)):
        score = gssf.late_interaction(
            document, query, torch.ones(2), pooling="max-sum", region_mask=torch.tensor([mask])
        )
        assert score.item() == pytest.approx(expected)


# ---------------------------------------------------------------- search


def test_faiss_and_torch_conventions_of_a_search() -> None:
    """Equal scores by the lower index, −inf and −1 where too few are left, as FAISS fills up; NaN first, as torch."""
    gallery, queries = rows([1.0], [2.0], [2.0], [math.nan]), rows([1.0])
    mask = torch.tensor([[True, True, True, False]])
    values, indices = gssf.topk(queries, gallery, torch.ones(1), k=4, mask=mask)
    assert indices.tolist() == [[1, 2, 0, -1]] and values.tolist() == [[2.0, 2.0, 1.0, -math.inf]]
    _, indices = gssf.topk(queries, gallery, torch.ones(1), k=2)
    assert indices.tolist() == [[3, 1]] and torch.tensor([1.0, 2.0, 2.0, math.nan]).topk(1).indices.item() == 3


# ---------------------------------------------------------------- losses


def test_open_clips_losses() -> None:
    """ClipLoss of the identity: log(1 + 1/e). SigLipLoss at scale 10 and bias −10: log 2 + log(1 + e⁻¹⁰)."""
    x, W = torch.eye(2), torch.ones(2)
    assert gssf.info_nce(x, x, W, logit_scale=1.0).item() == pytest.approx(0.31326169, abs=1e-6)
    loss = gssf.sigmoid_loss(x, x, W, logit_scale=10.0, logit_bias=-10.0)
    assert loss.item() == pytest.approx(0.69319258, abs=1e-6)


def test_cross_entropy_with_label_smoothing() -> None:
    """PyTorch's, which Liger's kernel agrees with: ε of the target is spread over all classes, its own among them."""
    S = rows([2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 1.0])
    loss = gssf.info_nce(S, torch.eye(3), torch.ones(3), logit_scale=1.0, label_smoothing=0.1, symmetric=False)
    logs = S.double().numpy() - np.log(np.exp(S.double().numpy()).sum(1, keepdims=True))
    expected = -(0.9 * np.diag(logs) + 0.1 * logs.mean(1)).mean()
    assert expected == pytest.approx(1.17981560, abs=1e-8)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_vse_hinge() -> None:
    """Margin 0.2: of [[0.9, 0.8], [0.3, 0.5]] the rows pay 0.1 and 0, the columns 0 and 0.5; the hardest are all."""
    S = rows([0.9, 0.8], [0.3, 0.5])
    for hardest in (False, True):
        loss = gssf.triplet_loss(S, torch.eye(2), torch.ones(2), margin=0.2, hardest=hardest)
        assert loss.item() == pytest.approx(0.6, abs=1e-6)


def test_scaled_dot_product_attention() -> None:
    """Scores 1/√2 and 0: weights 0.66976 and 0.33024 of values 1 and 2, as MultiheadAttention's heads have it."""
    q, k, v = rows([1.0, 0.0])[None], torch.eye(2)[None], rows([1.0], [2.0])[None]
    assert gssf.attention(q, k, v, torch.ones(2)).item() == pytest.approx(1.3302387, abs=1e-6)
    # Only the first key is allowed: MultiheadAttention's bool masks say which are not, these say which are.
    assert gssf.attention(q, k, v, torch.ones(2), attn_mask=torch.tensor([[True, False]])).item() == 1.0
