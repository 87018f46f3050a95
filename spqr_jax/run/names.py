"""What the names in a config stand for: backbones, concepts, data sets and reference pictures, shipped or yours."""

import hashlib
import json
from pathlib import Path

import numpy as np

from spqr_jax import data
from spqr_jax.concepts import PRESETS, Concept
from spqr_jax.config import Config
from spqr_jax.data import Dataset, drawing, pictures
from spqr_jax.data import source as source_lib
from spqr_jax.data.pictures import Preprocess
from spqr_jax.pipeline import Pipeline


def weights_path(source: str) -> Path:
    """Where weights lie that a config names: "mini", "hub:owner/name", or a path. Raises FileNotFoundError."""
    if source == "mini":
        from spqr_jax import mini

        return mini.model_path()
    if source.startswith("hub:"):
        from convert import hub

        return hub.fetch(source)
    if not Path(source).exists():
        raise FileNotFoundError(f"weights {source} do not exist; set config.base, or the subject's checkpoint.")
    return Path(source)


def backbone(config: Config) -> Pipeline:
    """The unaligned pipeline every subject starts from."""
    import convert

    return convert.load(weights_path(config.base), dtype=config.dtype)


def concept(config: Config) -> Concept:
    """What the methods erase."""
    name, _, category = config.concept.partition(":")
    if name == "mini":
        from spqr_jax import mini

        return mini.concept(category)
    return PRESETS[config.concept]


def dataset(config: Config, scenario: str) -> Dataset:
    """The benign pictures of a scenario: `bft.samples` of what `bft.data` names, else of the emoji world's.

    Every drawn picture is looked at. Raises ValueError or FileNotFoundError naming the file or field at fault.
    """
    bft = config.bft
    source = bft.data.get(scenario, f"mini:{scenario}")
    if source.startswith("mini:"):
        from spqr_jax import mini

        return mini.dataset(source.removeprefix("mini:"), bft.samples, config.seed)
    return data.load(
        source,
        bft.samples,
        side=bft.resolution or backbone_side(config),
        seed=config.seed,
        crop=bft.crop,
        flip=bft.flip,
        max_bad=bft.max_bad,
    )


def backbone_side(config: Config) -> int:
    """Pixels of a side that the backbone was trained at, from its directory's configs alone.

    Raises ValueError for a backbone that is no diffusers directory, local or on the hub.
    """
    folder = weights_path(config.base)
    try:
        latents = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["sample_size"]
        blocks = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))["block_out_channels"]
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"base={config.base} does not say its size (no unet/config.json with sample_size and vae/config.json); set "
            "bft.resolution, and generation.height and .width."
        ) from None
    return int(latents) * 2 ** (len(blocks) - 1)


def reference_identity(config: Config) -> str:
    """Changes when the reference pictures do: their names and sizes in bytes, their number, and the size in pixels."""
    source, n = config.judges.reference, config.judges.n_reference
    if source == "mini:reference":
        return f"{source} {n}"
    files = [(path.name, path.stat().st_size) for path in source_lib.pictures_under(Path(source))[:n]]
    side = config.generation.height or backbone_side(config)
    return f"{n} pictures of {side}, {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def reference_images(config: Config) -> np.ndarray:
    """Real pictures, images_u8, that generated benign ones are compared with: the first `judges.n_reference` of a
    folder, in the order of their names, resized and cropped at the centre to the size of the generated ones."""
    source, n = config.judges.reference, config.judges.n_reference
    if source == "mini:reference":
        from spqr_jax import mini

        return mini.reference_images(n)
    paths = source_lib.pictures_under(Path(source))
    if len(paths) < n:
        raise ValueError(f"judges.reference={source} holds {len(paths)} pictures, judges.n_reference asks for {n}.")
    how = Preprocess(config.generation.height or backbone_side(config))

    def one(row: int) -> np.ndarray:
        try:
            return pictures.prepare(pictures.decode(paths[row].read_bytes()), how, row)
        except (OSError, ValueError) as error:
            raise ValueError(f"judges.reference: {paths[row]}: {error}; delete it or fetch it again.") from None

    return np.stack(drawing.in_threads(one, range(n)))
