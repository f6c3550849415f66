"""Re-identification: identity = character, camera = typeface, or Market-1501's pedestrians and cameras.

    python examples/study_reid.py
    python examples/study_reid.py --data market1501 --root ~/data --steps 5000 --width 64

Trained on some identities and tested on others: CMC and mAP, matches of the query's own camera left out (Zheng et al.,
ICCV 2015). The loss is the hinge with the hardest negative of the batch.
"""

from __future__ import annotations

import sys

import torch
from study_data import Labelled, Source, reid_parts
from study_runner import REMEDIES, Study, main
from study_tasks import LabelTask
from study_trainer import Column, Settings, folded

import gssf_triton


class ReidTask(LabelTask):
    """LabelTask tested by the re-identification protocol."""

    def __init__(
        self, settings: Settings, column: Column, seed: int, train: Labelled, query: Labelled, gallery: Labelled
    ) -> None:
        super().__init__(settings, column, seed, train)
        self.query, self.gallery = query, gallery

    def evaluate(self) -> dict[str, float]:
        queries, metric = folded(self.metric, self.encode(self.query))
        gallery = self.encode(self.gallery)
        query_ids, query_cams, gallery_ids, gallery_cams = (
            torch.from_numpy(labels).to(gallery.device)
            for labels in (self.query.ids, self.query.cams, self.gallery.ids, self.gallery.cams)
        )
        return gssf_triton.metrics.reid(
            queries, gallery, **metric, query_ids=query_ids, gallery_ids=gallery_ids, query_cams=query_cams,
            gallery_cams=gallery_cams, ks=(1, 5, 10),
        )  # fmt: skip


def make(settings: Settings, column: Column, seed: int, source: Source) -> ReidTask:
    return ReidTask(settings, column, seed, *reid_parts(source, seed))


STUDY = Study(
    name="reid",
    title="Re-identification",
    headline="map",
    headline_title="mAP (%)",
    shown=("cmc1", "cmc5", "map"),
    data=("glyphs", "market1501"),
    settings=Settings(steps=100, evaluations=1),
    columns=("cosine", "diag", "bdiag-32", "both-8", "both-32"),
    make=make,
    remedies=(*REMEDIES, "symmetric=True"),
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
