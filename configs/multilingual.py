"""Multilingual scenario: standard fine-tuning on Arabic, Spanish, French and Hindi captions. Paper: Tables 1 and 5.

    python launch.py --config configs/multilingual.py
    python launch.py --config configs/multilingual.py:none,uce --config.bft.scenarios="('multilingual_hi',)"

Needs what configs/general.py needs, and pictures/multilingual.csv: columns id (of a COCO image), language (ar, es,
fr, hi), caption; at least 5,000 rows a language over images of train2017. The paper's translations are not published.
Public ones: romrawinjp/multilingual-coco (CC BY 4.0; ar and es, no fr or hi) and floschne/xm3600 (CC BY 4.0; all four,
by people, over other images), both Parquet with the images inside, read as they are:

    --config.bft.data.multilingual_ar="parquet:DIR?language=ar"

Harmful and benign prompts stay English: what is asked is whether fine-tuning in another language loses safety.
Cost: 12 subjects, 48 cells; 60,000 images and 150,240 steps, 1.1e19 FLOP, about 30 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(chosen: str = "") -> Config:
    return paper.experiment(paper.subjects(chosen), scenarios=paper.LANGUAGES)
