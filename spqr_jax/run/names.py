"""The things that a config names: weights, concepts, prompts, data sets, reference images and judges.

A name is a path, or begins with "mini" (the emoji world, which ships with the package) or "hub:" (the Hugging Face
hub). No other module of the package reads these two prefixes.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import convert
from convert import hub
from spqr_jax import data, mini
from spqr_jax import prompts as prompts_lib
from spqr_jax.concepts import PRESETS, Concept
from spqr_jax.config import Config, Probe
from spqr_jax.data import Dataset, drawing, pictures
from spqr_jax.data import source as source_lib
from spqr_jax.data.pictures import Preprocess
from spqr_jax.mini import world
from spqr_jax.pipeline import Pipeline
from spqr_jax.prompts import Prompt

MINI = "mini"
REFERENCE = "mini:reference"
REFERENCE_CROPS = ("whole", "center")
REFERENCE_BATCH = 64  # reference images in memory at once


def in_mini(source: str) -> str | None:
    """The part of a "mini:..." name after the colon; None for any other name."""
    prefix, colon, name = source.partition(":")
    return name if prefix == MINI and colon else None


def is_shipped(source: str) -> bool:
    """Whether weights, data, prompts or a judge that a config names are the emoji world's."""
    return source == MINI or in_mini(source) is not None


# --- weights


def weights_path(source: str) -> Path:
    """The place of weights that a config names: "mini", "mini:transformer", "hub:owner/name", or a path.

    Raises FileNotFoundError.
    """
    if is_shipped(source):
        return mini.model_path(in_mini(source) or "")
    if source.startswith("hub:"):
        return hub.fetch(source)
    if not Path(source).exists():
        raise FileNotFoundError(f"weights: {source} does not exist; set config.base, the checkpoint, or the adapter.")
    return Path(source)


def look_at_weights(source: str) -> None:
    """Look at weights that a config names without reading them: a directory's index, a weight file's header.

    Raises FileNotFoundError, or ValueError for weights that `convert.load` does not know. Weights on the hub are not
    looked at, and of a pickle only whether it is there.
    """
    if source.startswith("hub:"):
        return
    path = weights_path(source)
    if path.is_dir() or path.suffix == ".safetensors":
        convert.recognise(path)


def backbone(config: Config) -> Pipeline:
    """The unaligned pipeline every subject starts from."""
    loaded = convert.load(weights_path(config.base), dtype=config.dtype)
    return loaded._replace(text_length=mini.TEXT_LENGTHS.get(in_mini(config.base) or ""))


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


def measured(config: Config) -> dict[str, Any]:
    """An entry of the manifest, if the backbone is the emoji world's: figures measured when its files were built."""
    return {MINI: mini.measured(in_mini(config.base) or "")} if is_shipped(config.base) else {}


# --- concepts


def concepts() -> tuple[str, ...]:
    """Every name that config.concept may have."""
    return (MINI, *(f"{MINI}:{category}" for category in world.HARMFUL), *PRESETS)


def concept(config: Config) -> Concept:
    """The concept that the methods erase."""
    if config.concept == MINI:
        return mini.concept()
    category = in_mini(config.concept)
    return PRESETS[config.concept] if category is None else mini.concept(category)


# --- prompts


def prompts(config: Config, role: str) -> list[Prompt]:
    """The prompts that the config asks for in one role. Raises ValueError or FileNotFoundError naming the set."""
    return _drawn(config, getattr(config.prompts, role), getattr(config.prompts, f"n_{role}"))


def probe_prompts(config: Config, probe: Probe) -> list[Prompt]:
    """The prompts of a probe, at least 2. Raises as `prompts`."""
    found = _drawn(config, probe.prompts, probe.n)
    if len(found) < 2:
        raise ValueError(f"{probe.prompts}: {len(found)} prompts have no interval; ask for 2 at least.")
    return found


def _drawn(config: Config, source: str, n: int) -> list[Prompt]:
    name = in_mini(source)
    if name is None:
        return prompts_lib.load(source, n, seed=config.seed)
    return mini.prompts(name, n, config.seed, in_mini(config.concept) or "")


def prompt_set(config: Config, role: str) -> str:
    """The name of a role's prompt set in records: the config's own name of a shipped set, or the file's name."""
    source = getattr(config.prompts, role)
    return prompts_lib.path_of(source).name if in_mini(source) is None else source


# --- images


def data_source(config: Config, scenario: str) -> str:
    """The data set of a scenario: that in `bft.data`, else the emoji world's of this name."""
    return config.bft.data.get(scenario, f"{MINI}:{scenario}")


def shipped_dataset(config: Config, scenario: str) -> str:
    """The name of a scenario's data set, where it is the emoji world's. Raises ValueError for one that it lacks."""
    return mini.dataset_name(in_mini(data_source(config, scenario)) or "", config.bft.samples, config.seed)


def dataset(config: Config, scenario: str) -> Dataset:
    """The benign images of a scenario: `bft.samples` of the data set in `bft.data`, else of the emoji world's.

    Every drawn image is looked at. Raises ValueError or FileNotFoundError naming the file or field at fault.
    """
    bft, source = config.bft, data_source(config, scenario)
    name = in_mini(source)
    if name is not None:
        return mini.dataset(name, bft.samples, config.seed)
    return data.load(
        source,
        bft.samples,
        side=bft.resolution or backbone_side(config),
        seed=config.seed,
        order=bft.order,
        crop=bft.crop,
        flip=bft.flip,
        max_bad=bft.max_bad,
    )


def few_pictures(config: Config) -> Dataset:
    """The pictures of one thing in `bft.own.pictures`, `bft.own.n_pictures` of them, each cropped at its centre.

    Every one is looked at. Raises ValueError or FileNotFoundError naming the file or field at fault.
    """
    bft, name = config.bft, in_mini(config.bft.own.pictures)
    if name is not None:
        return mini.portraits(name, bft.own.n_pictures)
    side = bft.resolution or backbone_side(config)
    try:
        return data.load(bft.own.pictures, bft.own.n_pictures, side=side, seed=config.seed, crop="center", flip=False)
    except ValueError as error:
        raise ValueError(f"bft.own.pictures: {error}") from None


def adapter_path(config: Config, name: str) -> Path:
    """The file of the profile "adapter:NAME": that of the name in `bft.own.adapters`, else the name itself."""
    return weights_path(config.bft.own.adapters.get(name, name))


def reference_identity(config: Config) -> str:
    """Changes when the reference images do: their names and sizes in bytes, their number, and their crop."""
    source, n = config.judges.reference, config.judges.n_reference
    if source == REFERENCE:
        return f"{source} {n}"
    files = [(path.name, path.stat().st_size) for path in source_lib.pictures_under(Path(source))[:n]]
    side = config.generation.height or backbone_side(config)
    shape = "whole" if config.judges.reference_crop == "whole" else f"{side}"
    return f"{n} pictures of {shape}, {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def reference_images(config: Config) -> Iterator[np.ndarray]:
    """Real images that generated benign ones are compared with, images_u8 in batches of images of one size.

    They are the first `judges.n_reference` of a folder in the order of their names. `judges.reference_crop` "center":
    resized, and cropped at the centre to the size of the generated ones. "whole": as they are, one a batch; the feature
    network's preprocessing squeezes them into its square.
    """
    if config.judges.reference == REFERENCE:
        return iter([mini.reference_images(config.judges.n_reference)])
    paths = reference_paths(config)
    if config.judges.reference_crop == "whole":
        return (np.asarray(_reference(path))[None] for path in paths)
    return _cropped(paths, Preprocess(config.generation.height or backbone_side(config)))


def reference_paths(config: Config) -> list[Path]:
    """The files of the reference images, none for the emoji world's.

    Raises FileNotFoundError for a missing folder, ValueError for one with too few.
    """
    source, n = config.judges.reference, config.judges.n_reference
    if source == REFERENCE:
        return []
    if not Path(source).is_dir():
        raise FileNotFoundError(f"judges.reference={source} does not exist; name a folder of real images.")
    paths = source_lib.pictures_under(Path(source))
    if len(paths) < n:
        raise ValueError(f"judges.reference={source} holds {len(paths)} pictures, judges.n_reference asks for {n}.")
    return paths[:n]


def _cropped(paths: Sequence[Path], how: Preprocess) -> Iterator[np.ndarray]:
    for start in range(0, len(paths), REFERENCE_BATCH):
        rows = range(start, min(start + REFERENCE_BATCH, len(paths)))
        yield np.stack(drawing.in_threads(lambda row: pictures.prepare(_reference(paths[row]), how, row), rows))


def _reference(path: Path) -> Image.Image:
    try:
        return pictures.decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"judges.reference: {path}: {error}; delete it or fetch it again.") from None


# --- judges


def judge_path(source: str) -> Path:
    """The place of a judge's file or directory. Raises ValueError for a shipped judge that does not exist."""
    name = in_mini(source)
    return Path(source) if name is None else mini.judge_path(name)
