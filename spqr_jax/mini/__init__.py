"""The emoji world: small latent diffusion models in Stable Diffusion's layouts, with their data, prompts and judges.

The files that ship are the result of `python -m spqr_jax.recipe.build`. This room may use config, params, data,
prompts, concepts, files, schedulers and pipeline; it knows nothing of methods or runs. `spqr_jax.run.names` asks it
for whatever a config names with "mini".
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from spqr_jax import data
from spqr_jax.concepts import Concept
from spqr_jax.data import Dataset
from spqr_jax.mini import corpus, emoji, probes, world
from spqr_jax.mini.catalogue import check
from spqr_jax.prompts import Prompt

MODEL = Path(__file__).parent / "assets" / "model"
TRANSFORMER = Path(__file__).parent / "assets" / "transformer"
MODELS = {"": MODEL, "transformer": TRANSFORMER}  # what a config names "mini" and "mini:transformer"
# Rows of zeros in the place of T5's states, with which the transformer was trained: as few as diffusers can have.
TEXT_LENGTHS = {"transformer": 1}
JUDGES = Path(__file__).parent / "assets" / "judges"
LOGS = Path(__file__).parent / "assets" / "training"  # the losses of every training, by step
MEASURED = {"": "measured.json", "transformer": "measured_transformer.json"}  # beside the judges
JUDGE_FILES = {"harm": "harm.onnx", "features": "features.onnx", "clip": "clip"}
PROMPT_SETS = ("harmful", *world.HARMFUL, "benign")


def prompts(name: str, n: int, seed: int, erased: str = "") -> list[Prompt]:
    """The first `n` prompts of "harmful", one of its categories, "benign" or one of `probes.SETS`, drawn with `seed`.

    erased: the category of harmful objects that the probes are about, all of them if empty.
    Raises ValueError for another name, and for a set that does not exist or has fewer prompts.
    """
    if name in probes.SETS:
        drawn = probes.prompts(name, n, seed, erased)
    elif name == "benign":
        drawn = world.benign_prompts(n, seed)
    elif name in PROMPT_SETS:
        objects = {name: world.HARMFUL[name]} if name in world.HARMFUL else world.HARMFUL
        drawn = world.harmful_prompts(n, seed, objects)
    else:
        known = ", ".join((*PROMPT_SETS, *probes.SETS))
        raise ValueError(f"prompt set mini:{name} is unknown; expected one of {known}.")
    return [Prompt(p.id, p.prompt, p.category, p.language, p.seed) for p in drawn]


@functools.lru_cache(maxsize=8)  # every cell of a sweep asks again
def dataset(scenario: str, n: int, seed: int) -> Dataset:
    """`n` benign captioned images of a fine-tuning scenario."""
    examples = world.bft_dataset(scenario, n, seed)
    images = emoji.render([example.picture for example in examples])
    return data.from_arrays(images, [example.caption for example in examples], name=dataset_name(scenario, n, seed))


def dataset_name(scenario: str, n: int, seed: int) -> str:
    """The name of `dataset(scenario, n, seed)`, which says all that it depends on. Raises ValueError as `dataset`."""
    if scenario not in world.SCENARIOS:
        raise ValueError(f"data set mini:{scenario} is unknown; expected one of {', '.join(world.SCENARIOS)}.")
    return f"mini:{scenario} {n} {seed}"


def portraits(name: str, n: int) -> Dataset:
    """`n` pictures of one benign object by its name, in the style that the world does not know, one a background."""
    codes = [code for code, known in world.BENIGN.items() if known == name]
    if not codes or not 1 <= n <= len(world.BACKGROUNDS):
        raise ValueError(
            f"mini:{name}, {n} pictures: expected one of {', '.join(world.BENIGN.values())}, and at most "
            f"{len(world.BACKGROUNDS)} pictures."
        )
    pictures = [world.Picture(codes[0], "fluent", background) for background in list(world.BACKGROUNDS)[:n]]
    captions = [world.caption(picture) for picture in pictures]
    return data.from_arrays(emoji.render(pictures), captions, name=f"mini:portraits of {name} {n}")


def reference_images(n: int, seed: int = 0) -> np.ndarray:
    """`n` real images of the benign objects in the styles the generator knows, in compositions it never saw."""
    styles = tuple(world.STYLES.index(style) for style in world.SEEN_STYLES)
    everything = corpus.compositions(len(corpus.OBJECTS), styles)
    benign = corpus.held_out(everything) & (everything.object >= len(world.CATEGORY))
    candidates = np.flatnonzero(benign)
    if n > len(candidates):
        raise ValueError(f"judges.n_reference={n}, but the emoji world has {len(candidates)} reference pictures.")
    chosen = np.random.default_rng(seed).choice(candidates, n, replace=False)
    return corpus.pictures(everything.take(chosen), corpus.object_rows())


def concept(category: str = "") -> Concept:
    """The concept that methods erase: every harmful object by name, or those of one category.

    Methods that preserve something preserve the benign names, alone and in the shorter captions: a name's text state
    in a caption is another one than alone, and an edit that keeps bare names alone spoils captions (docs/mini.md has
    the numbers, measured on prompts that are not scored). Whole prompts name an object alone, in a style or on a
    background; every scored prompt names both, so no method sees one. They are mixed, so that the first few stand for
    all.
    """
    if category and category not in world.HARMFUL:
        raise ValueError(f"concept mini:{category} is unknown; expected one of {', '.join(world.HARMFUL)}.")
    chosen = [category] if category else world.HARMFUL
    harmful = tuple(word for name in chosen for word in world.HARMFUL[name].values())
    benign = tuple(world.BENIGN.values())
    # Each harmful name has one benign name that it is relabelled to; the others follow, so that all are retained.
    partners, others = benign[: len(harmful)], benign[len(harmful) :]
    kept = _framed(benign)
    return Concept(
        f"emoji {category or 'harm'}",
        harmful,
        preserve=kept,
        prompts=_framed(harmful),
        replacements=_framed(partners) + _framed(others),
        retain=kept,
        templates=_frames(),
    )


def _frames() -> tuple[str, ...]:
    """The shorter captions that the world was trained on, with {} for the name."""
    styled = (f"a {style} emoji of {{}}" for style in world.SEEN_STYLES)
    placed = (
        f"{{}} on a {background} background".replace(" a orange", " an orange") for background in world.BACKGROUNDS
    )
    return ("{}", *styled, *placed)


def _framed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Every name in every frame; text i names names[i % N], and the frames change from name to name.

    So a method that takes the first 160 texts for its pictures gets captions of all kinds, and not bare names alone.
    """
    frames = _frames()
    return tuple(
        frames[(i + turn) % len(frames)].format(name) for turn in range(len(frames)) for i, name in enumerate(names)
    )


def judge_path(name: str) -> Path:
    """Where a shipped judge lies. Raises ValueError for an unknown name, FileNotFoundError with the remedy, AssetError
    naming a file that is not as the recipe wrote it."""
    if name not in JUDGE_FILES:
        raise ValueError(f"judge mini:{name} is unknown; expected one of {', '.join(JUDGE_FILES)}.")
    path = _existing(JUDGES / JUDGE_FILES[name])
    check(JUDGES)
    return path


def model_path(name: str = "") -> Path:
    """The diffusers directory of a shipped model: the UNet's, or "transformer", of Stable Diffusion 3's form.

    Raises FileNotFoundError for another name, and with the remedy where the package is not whole; AssetError naming a
    file that is not as the recipe wrote it.
    """
    if name not in MODELS:
        known = ", ".join(f"mini:{known}" if known else "mini" for known in MODELS)
        raise FileNotFoundError(f"model mini:{name} is unknown; expected one of {known}.")
    path = _existing(MODELS[name])
    check(path)
    return path


def measured(model: str = "") -> dict[str, Any]:
    """What `spqr_jax.recipe.measure` found about the judges and one of MODELS when they were built; else nothing."""
    files = [MEASURED[name] for name in ("", model) if model in MEASURED]
    found = [json.loads((JUDGES / file).read_text(encoding="utf-8")) for file in files if (JUDGES / file).exists()]
    return {name: value for figures in found for name, value in figures.items()}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; reinstall the package, or run python -m spqr_jax.recipe.build.")
    return path
