"""Adaptations beyond the protocols' profiles: whether they fit the backbone, what they read, and a file of adapters."""

from pathlib import Path

import jax
import numpy as np

import convert
from convert import kinds
from spqr_jax import finetune, profiles, protocols
from spqr_jax.config import Config
from spqr_jax.files import storage
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import names
from spqr_jax.run.bft import adapter_options
from spqr_jax.run.generation import sampling_options
from spqr_jax.run.missing import Opened
from spqr_jax.sampling import call as call_lib
from spqr_jax.sampling.call import Sampling
from spqr_jax.training import words


def check(config: Config, opened: Opened) -> None:
    """Raise ValueError for the first adaptation that the backbone does not take, naming it and why.

    A file of adapters is merged into the backbone once. The others are prepared by shapes.
    """
    for profile in config.bft.profiles:
        try:
            if protocols.adapter_of(profile):
                merged(config, opened.backbone, profile)
            elif profile in protocols.OWN_PROFILES:
                _check_trained(config, opened, profile)
        except (ValueError, MemoryError) as error:
            raise ValueError(f"config.bft.profiles: {profile}: {error}") from error


def _check_trained(config: Config, opened: Opened, profile: str) -> None:
    backbone, options = opened.backbone, adapter_options(config.bft, profile)
    jax.eval_shape(lambda: finetune.prepare(backbone, profile, **options, seed=0)[1])
    if profile == "textual_inversion":
        words.read(backbone, config.bft.own.word)
    if profile == "dreambooth":
        size = call_lib.size_of(backbone, Sampling(**sampling_options(config)))
        assert opened.few_pictures is not None  # `check` of the config asks for them
        found = opened.few_pictures.images(np.arange(1)).shape[1:3]
        if size != found:
            raise ValueError(
                f"class pictures are drawn at {size[0]}x{size[1]} and the pictures are {found[0]}x{found[1]}; set "
                "config.bft.resolution to the size of generation."
            )


def identities(config: Config, opened: Opened) -> dict[str, str]:
    """Profile -> what it reads in place of the scenario's data, by content (`spqr_jax.run.identity.Inputs`)."""
    found = {profile: _content(path) for profile, path in opened.adapters.items()}
    for profile in config.bft.profiles:
        if profile in profiles.OF_FEW_PICTURES and opened.few_pictures is not None:
            found[profile] = opened.few_pictures.name
    return found


def _content(path: Path) -> str:
    """sha256 of a file or directory, and of the adapter_config.json beside a file, which is read with it."""
    config = path.parent / "adapter_config.json"
    return " ".join(storage.sha256(one) for one in (path, config) if one == path or (path.is_file() and one.exists()))


def merged(config: Config, pipeline: Pipeline, profile: str) -> Pipeline:
    """The pipeline with the file of "adapter:NAME" merged into its weights.

    Raises ValueError if the file holds no adapters, or those of another family.
    """
    name = protocols.adapter_of(profile)
    assert name is not None
    path = names.adapter_path(config, name)
    kind = convert.recognise(path).kind
    if kind not in (kinds.LORA, kinds.SPM):
        raise ValueError(f"{path} is {kinds.article(kind)}, expected a LoRA or DoRA; a subject may be a checkpoint.")
    return convert.load(path, base=pipeline, dtype=config.dtype)._replace(name=pipeline.name)
