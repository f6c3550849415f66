"""Image–text retrieval with one vector an image and one a text: glyphs and names, or Flickr30K and COCO features.

    python examples/study_image_text.py
    python examples/study_image_text.py --data f30k --root ~/data --steps 20000 --dim 1024 --width 64

The recipe is VSE++'s (Faghri et al., BMVC 2018): hinge of margin 0.2, batches of 128, the hardest negative after a
warm-up with all of them. Tested on names (images) never seen in training.
"""

from __future__ import annotations

import sys

from study_data import Source, image_text_pairs
from study_runner import Study, main
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
    settings=Settings(evaluations=3),
    columns=("cosine", "diag", "bdiag-32", "both-8", "both-32"),
    make=make,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
