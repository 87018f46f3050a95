"""What the names in a config stand for: backbones, concepts, data sets and reference pictures, shipped or yours."""

from pathlib import Path

import numpy as np

from spqr_jax.config import Config
from spqr_jax.data import Dataset
from spqr_jax.methods.concept import PRESETS, Concept
from spqr_jax.pipeline import Pipeline


def backbone(config: Config) -> Pipeline:
    """The unaligned pipeline every subject starts from."""
    import convert

    if config.base == "mini":
        from spqr_jax import mini

        return convert.load(mini.model_path(), dtype=config.dtype)
    return convert.load(config.base, dtype=config.dtype)


def concept(config: Config) -> Concept:
    """What the methods erase."""
    if config.concept == "mini":
        from spqr_jax import mini

        return mini.concept()
    return PRESETS[config.concept]


def dataset(config: Config, scenario: str) -> Dataset:
    """The benign pictures of a scenario. Raises ValueError for a name that stands for nothing."""
    source = config.bft.data.get(scenario, f"mini:{scenario}")
    if source.startswith("mini:"):
        from spqr_jax import mini

        return mini.dataset(source.removeprefix("mini:"), config.bft.samples, config.seed)
    raise ValueError(f"config.bft.data[{scenario!r}]={source!r} is unknown; expected mini:<scenario>.")


def reference_images(config: Config) -> np.ndarray:
    """Real pictures, images_u8, that generated benign ones are compared with."""
    source = config.judges.reference
    if source == "mini:reference":
        from spqr_jax import mini

        return mini.reference_images(config.judges.n_reference)
    from spqr_jax import images

    paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(paths) < config.judges.n_reference:
        raise ValueError(
            f"judges.reference={source} holds {len(paths)} pictures, expected {config.judges.n_reference}."
        )
    return images.read(paths[: config.judges.n_reference])
