"""Image–text retrieval with one vector an image and one a text: glyphs and names, or Flickr30K and COCO features.

    python examples/study_image_text.py
    python examples/study_image_text.py --data f30k --root ~/data

Tested on names (images) never seen in training. The glyphs' short budget trains with InfoNCE, under which the towers
learn three times as much as under the hinge; Flickr30K and COCO take the recipe of VSE++ (Faghri et al., BMVC
2018): hinge of margin 0.2, batches of 128, the hardest negative after an epoch with all of them, 30 epochs.
"""

from __future__ import annotations

import sys

from study_data import Source, image_text_pairs
from study_runner import VSE_RECIPE, Study, main
from study_tasks import PairTask
from study_trainer import Column, Settings


def make(settings: Settings, column: Column, seed: int, source: Source) -> PairTask:
    return PairTask(settings, column, seed, *image_text_pairs(source, seed))


STUDY = Study(
    name="image_text",
    title="Image–text retrieval, global features",
    headline="rsum",
    headline_title="rsum (of 600)",
    shown=("i2t_r1", "t2i_r1", "rsum"),
    data=("glyphs", "f30k", "coco"),
    settings=Settings(loss="info_nce", learning_rate=8e-3, evaluations=3),
    recipe=VSE_RECIPE,
    columns=("cosine", "diag", "bdiag-32", "both-8", "both-32"),
    make=make,
    # If the towers' last layers learn the same as the metric, the metric helps once they are frozen.
    causes=tuple(f"{column}:fixed_heads=True" for column in ("cosine", "diag", "both-8", "both-32")),
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
