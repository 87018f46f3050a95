"""What the emoji world's models are trained on: images by index, captions by table, and what is held out."""

import functools
from typing import NamedTuple

import numpy as np

from spqr_jax.mini import emoji, world
from spqr_jax.mini.catalogue import catalogue, name

OBJECTS = tuple([*world.CATEGORY, *world.BENIGN])
BARE_TEMPLATES = ("{name}", "a {style} emoji of {name}", "{name} on a {background} background")
VARIANTS = len(world.TEMPLATES["en"]) + len(BARE_TEMPLATES) + 1  # the last uses the keyword where an object has one
HELD_OUT_SHARE = 10  # one composition in ten is never trained on


class Compositions(NamedTuple):
    """N images by index: object (in OBJECTS, or in the catalogue), style, background, shift."""

    object: np.ndarray
    style: np.ndarray
    background: np.ndarray
    dx: np.ndarray
    dy: np.ndarray

    def take(self, index) -> "Compositions":
        return Compositions(*(field[index] for field in self))


def compositions(objects: int, styles: tuple[int, ...]) -> Compositions:
    """Every object x style x background x shift."""
    steps = np.arange(world.MAX_OFFSET + 1)
    grid = np.meshgrid(np.arange(objects), styles, np.arange(len(world.BACKGROUNDS)), steps, steps, indexing="ij")
    return Compositions(*(axis.reshape(-1) for axis in grid))


def held_out(c: Compositions) -> np.ndarray:
    """True for the compositions that no model is trained on: every object in every style has some."""
    mixed = c.object * 7919 + c.style * 104_729 + c.background * 1_299_709 + c.dx * 15_485_863 + c.dy * 32_452_843
    return mixed % HELD_OUT_SHARE == 0


@functools.cache
def object_rows() -> np.ndarray:
    """Sprite row of each of OBJECTS."""
    index = emoji.load().index
    return np.array([index[code] for code in OBJECTS])


@functools.cache
def other_rows() -> np.ndarray:
    """Sprite rows of every further benign emoji of the catalogue: the judges must not flag these either."""
    return np.array([entry.index for code, entry in catalogue().items() if code not in OBJECTS])


def pictures(c: Compositions, rows: np.ndarray) -> np.ndarray:
    """images_u8 [N, 32, 32, 3]; `rows` maps c.object to sprite rows."""
    colours = np.array(list(world.BACKGROUNDS.values()), np.uint8)
    sprites = emoji.load().sprites[c.style, rows[c.object]]
    return emoji.compose(sprites, colours[c.background], np.stack([c.dx, c.dy], axis=-1))


@functools.cache
def captions() -> np.ndarray:
    """Caption table [object, style, background, variant] of str."""
    table = np.empty((len(OBJECTS), len(world.STYLES), len(world.BACKGROUNDS), VARIANTS), object)
    for o, code in enumerate(OBJECTS):
        for s, style in enumerate(world.STYLES):
            for b, background in enumerate(world.BACKGROUNDS):
                table[o, s, b] = _variants(world.Picture(code, style, background))
    return table


def _variants(picture: world.Picture) -> list[str]:
    full = [world.caption(picture, template=t) for t in range(len(world.TEMPLATES["en"]))]
    words = {"name": name(picture.object, "en"), "style": picture.style, "background": picture.background}
    bare = [form.format(**words).replace(" a orange", " an orange") for form in BARE_TEMPLATES]
    return [*full, *bare, world.caption(picture, word=world.KEYWORDS.get(picture.object))]


def all_captions() -> list[str]:
    """Every caption in every language, for the tokenizer: its merges must not favour English alone."""
    texts = set(captions().reshape(-1).tolist())
    for code in OBJECTS:
        for language, templates in world.TEMPLATES.items():
            texts |= {
                world.caption(world.Picture(code, style, background), language=language, template=t)
                for style in world.STYLES
                for background in world.BACKGROUNDS
                for t in range(len(templates))
            }
    for entry in catalogue().values():
        texts |= set(entry.names.values())
    return sorted(texts)
