"""Pictures to forget and to retain, kept as latents: made by the base model itself, or a user's own."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spqr_jax import backbones, data
from spqr_jax import generate as generate_lib
from spqr_jax.backbones import Condition
from spqr_jax.data import Dataset, drawing
from spqr_jax.data.drawing import Look
from spqr_jax.data.pictures import Preprocess
from spqr_jax.data.source import Source
from spqr_jax.methods.tools.concepts import mention
from spqr_jax.methods.tools.loop import check_at_least
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import noise
from spqr_jax.training import latents


@dataclass(frozen=True)
class Pictures:
    """N captioned images as latent distributions.

    Attributes:
        mean, std: float32 [N, h, w, C] of the scaled latents.
        prompt: int [N], which of the prompts shows image n.
        condition: the prompts' captions as the denoiser reads them, P rows.
        captions: the P captions themselves.
    """

    mean: np.ndarray
    std: np.ndarray
    prompt: np.ndarray
    condition: Condition
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """{"mean", "std"} [B, h, w, C] and "condition", the captions' B rows, of these images."""
        return {"mean": self.mean[rows], "std": self.std[rows], "condition": self.condition.rows(self.prompt[rows])}


def make(
    pipeline: Pipeline,
    prompts: Sequence[str],
    count: int,
    *,
    seed: int,
    captions: Sequence[str] | None = None,
    given: str = "",
    option: str = "pictures",
    texts: Sequence[str] = (),
    least: int = 1,
    name: str = "pictures",
    steps: int = 50,
    guidance: float = 7.5,
    scheduler: str = "",
) -> Pictures:
    """`count` images of `prompts`, each prompt as often as any other, one more at most; encoded once.

    captions: for each prompt what its images are captioned with (default: the prompt). Which prompt an image shows
    and its noise depend on `seed` and its number alone. texts: what prompt i shows, text i modulo their number, each as
    often as any other and once in every so many images. given: a data source whose images are used instead, the
    value of the method's `option`; they keep their own captions, or with `texts` are those of `read`, captioned like
    the prompts of the same numbers. scheduler: one of `spqr_jax.schedulers.NAMES` (default: the backbone's sampler).
    Raises ValueError, before any work, for fewer than `least`, and as `read`.
    """
    check_at_least(name, images=(count, least))
    captions = list(prompts if captions is None else captions)
    if given:
        dataset, order = read(pipeline, given, count, texts=texts, seed=seed, name=f"{name}: {option}")
        return _encoded(pipeline, dataset, order, captions) if texts else _as_captioned(pipeline, dataset)
    order = prompt_numbers(len(prompts), count, seed, len(texts))
    shown = [prompts[i] for i in order]
    scheduler = scheduler or backbones.of(pipeline).sampler
    images = generate_lib.generate(pipeline, shown, seed, steps=steps, guidance=guidance, scheduler=scheduler)
    return _encoded(pipeline, data.from_arrays(images, shown, name), order, captions)


def make_each(
    pipeline: Pipeline,
    prompts: Sequence[Sequence[str]],
    count: int,
    *,
    seeds: Sequence[int],
    name: str,
    steps: int,
    guidance: float,
    scheduler: str,
) -> list[Pictures]:
    """For each list of prompts what `make` gives with the seed of the same number, all drawn and encoded together."""
    orders = [prompt_numbers(len(own), count, seed) for own, seed in zip(prompts, seeds, strict=True)]
    shown = [own[i] for own, order in zip(prompts, orders, strict=True) for i in order]
    shape = backbones.of(pipeline).latent_shape(pipeline, (backbones.of(pipeline).side(pipeline),) * 2)
    noises = np.concatenate([noise.of_numbers(seed, np.arange(count, dtype=np.uint32), shape) for seed in seeds])
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
    images = generate_lib.generate(pipeline, shown, 0, latents=noises, **how)
    mean, std = latents.encode(pipeline, data.from_arrays(images, shown, name)).scaled(pipeline)
    condition = backbones.condition(pipeline, [prompt for own in prompts for prompt in own])
    ends = np.cumsum([len(own) for own in prompts])
    return [
        Pictures(
            mean[k * count : (k + 1) * count],
            std[k * count : (k + 1) * count],
            order,
            condition.rows(slice(ends[k] - len(own), ends[k])),
            tuple(own),
        )
        for k, (own, order) in enumerate(zip(prompts, orders, strict=True))
    ]


def rows(pictures: Pictures, batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the images in each of `steps` batches: every epoch a new permutation drawn from `seed`."""
    return data.sample_order([len(pictures)], batch, steps, seed)


def prompt_numbers(prompts: int, count: int, seed: Any, texts: int = 0) -> np.ndarray:
    """Prompt numbers [count]: one permutation after another, so that a small set covers as many prompts as it can.

    With `texts`, of which prompt i shows text i % texts, the permutations are of the texts, every `texts` images show
    each of them once, and each goes through its own prompts.
    """
    texts, rng = texts or prompts, np.random.default_rng(seed)
    rounds = -(-count // texts)
    shown = np.concatenate([rng.permutation(texts) for _ in range(rounds)])[:count]
    if texts == prompts:
        return shown
    own = np.stack([prompt_numbers(prompts // texts, rounds, (seed, text)) for text in range(texts)])
    return shown + texts * own[shown, np.arange(count) // texts]


def _encoded(pipeline: Pipeline, dataset: Dataset, order: np.ndarray, captions: Sequence[str]) -> Pictures:
    mean, std = latents.encode(pipeline, dataset).scaled(pipeline)
    condition = backbones.condition(pipeline, captions)
    return Pictures(mean, std, order, condition, tuple(captions))


def _as_captioned(pipeline: Pipeline, dataset: Dataset) -> Pictures:
    """Every distinct caption is a prompt."""
    captions = list(dict.fromkeys(dataset.captions))
    order = np.array([captions.index(caption) for caption in dataset.captions])
    return _encoded(pipeline, dataset, order, captions)


# --- a user's own images -------------------------------------------------------------------------------------------


def read(
    pipeline: Pipeline, place: str, count: int, *, seed: int, name: str, texts: Sequence[str] = ()
) -> tuple[Dataset, np.ndarray]:
    """(`count` images of a data source, int [count]: which of `texts` each shows), drawn and shuffled by `seed`.

    Images have the size the UNet was trained at. Texts are shown equally often; an image shows the first of them
    that its caption holds, as whole words in any case of letters, and one text alone is shown by all. `name` is the
    method and its option. Raises FileNotFoundError or ValueError, naming them and the count, for a place without
    images, too few, one that cannot be read or has no caption, and a caption that holds none of several texts.
    """
    source = _opened(place, name)
    shows, order = _shown(source, texts, name), prompt_numbers(max(len(texts), 1), count, seed)
    shuffled, chosen = drawing.order(source, seed), np.empty(count, int)
    for number in range(max(len(texts), 1)):
        own, wanted = shuffled[shows[shuffled] == number], np.flatnonzero(order == number)
        _check_enough(name, place, len(own), len(wanted), f" of {texts[number]!r}" if texts else "")
        chosen[wanted] = own[: len(wanted)]
    return _prepared(pipeline, source, chosen, name), order


def check_given(place: str, count: int, name: str) -> None:
    """Raises as `read` for a place without `count` images, before other images are made; "" is none and passes."""
    if place:
        _check_enough(name, place, len(_opened(place, name)), count)


def pairs(
    pipeline: Pipeline, unsafe: str, safe: str, count: int, *, seed: int, name: str, least: int = 1
) -> tuple[Pictures, Pictures]:
    """(unsafe, safe) images whose rows belong together: row n of two data sources with the same captions.

    For example the two image columns of one table: folder:DIR?file=unsafe and folder:DIR?file=safe. Raises as `read`,
    and ValueError for sources that differ in captions or in length.
    """
    check_at_least(name, images=(count, least))
    names = [f"{name}: pictures", f"{name}: retain_pictures"]
    sources = [_opened(place, who) for place, who in zip((unsafe, safe), names, strict=True)]
    if sources[0].captions != sources[1].captions:
        found = " and ".join(f"{len(source)} rows in {source.name}" for source in sources)
        raise ValueError(
            f"{names[0]} and retain_pictures must be pairs: row n of both under one caption; found {found}."
        )
    chosen = drawing.order(sources[0], seed)[:count]
    _check_enough(names[0], unsafe, len(chosen), count)
    made = [
        _as_captioned(pipeline, _prepared(pipeline, source, chosen, who))
        for source, who in zip(sources, names, strict=True)
    ]
    return made[0], made[1]


def identity(place: str, name: str) -> str:
    """Hash of a data source's content, captions and images, wherever it lies: for cell ids. Raises as `read`."""
    source = _opened(place, name)
    looked = _looked(source, range(len(source)), name)
    content: tuple[Any, ...] = (source.captions, source.parts, [found.digest for found in looked])
    if source.plugin:
        content += (source.plugin,)
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _opened(place: str, name: str) -> Source:
    try:
        return data.open_source(place)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{name}: {error}") from None


def _shown(source: Source, texts: Sequence[str], name: str) -> np.ndarray:
    """The number of the text that each row shows, int [N]; 0 where there are not several."""
    if len(texts) < 2:
        return np.zeros(len(source), int)
    patterns = [mention(text) for text in texts]
    shows = [next((i for i, pattern in enumerate(patterns) if pattern.search(c)), -1) for c in source.captions]
    if -1 in shows:
        row = shows.index(-1)
        raise ValueError(
            f"{name}: the caption {source.captions[row]!r} of {source.where[row]} holds none of the texts to erase "
            f"({', '.join(texts)}); name in it what the picture shows."
        )
    return np.array(shows)


def _check_enough(name: str, place: str, found: int, wanted: int, of: str = "") -> None:
    if found < wanted:
        raise ValueError(
            f"{name}={place!r} holds {found} pictures{of}, `images` asks for {wanted}; add pictures or lower `images`."
        )


def _prepared(pipeline: Pipeline, source: Source, chosen: np.ndarray, name: str) -> Dataset:
    how = Preprocess(backbones.of(pipeline).side(pipeline))
    return drawing.dataset(source, _looked(source, chosen, name), how)


def _looked(source: Source, chosen: Sequence[int] | np.ndarray, name: str) -> list[Look]:
    looked = list(drawing.look(source, chosen))
    bad = [f"{source.where[found.row]}: {found.problem}" for found in looked if found.problem]
    if bad:
        raise ValueError(f"{name}: {len(bad)} of {len(looked)} pictures cannot be used: {'; '.join(bad[:5])}.")
    return looked
