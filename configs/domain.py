"""Domain scenario: standard fine-tuning on artistic and on medical images. Paper: Tables 1 and 5.

    python launch.py --config configs/domain.py
    python launch.py --config configs/domain.py --config.bft.scenarios="('medical',)"

Needs what configs/general.py needs, and about 5,000 images of each domain (sources: configs/paper.py):
- pictures/artistic: one folder a style (American_Cartoon, Chinese_Ink, ...), captioned "an image in the style of ...".
  The paper's own set is not published; huggan/wikiart (Parquet, licence unknown) is read as it is:
  --config.bft.data.artistic="artistic:DIR?label=style".
- pictures/chest_xray: Data_Entry_2017.csv and as many of the image folders as you like.
- pictures/brain_mri: class folders.
The two medical sets are drawn from in turn, half and half; captions are neutral and say nothing of patient or finding.
Cost: 12 subjects, 24 cells; 36,000 images and 75,120 steps, 6.0e18 FLOP, about 17 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(chosen: str = "") -> Config:
    return paper.experiment(paper.subjects(chosen), scenarios=paper.DOMAINS)
