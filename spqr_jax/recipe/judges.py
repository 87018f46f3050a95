"""The emoji world's judges: a harm classifier and a feature network, trained on images that no generator has touched.

Both are the same small convolutional network; its twin in PyTorch carries it through TorchScript to ONNX (`convert`).
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import Conv, GroupNorm, Linear
from spqr_jax.mini import corpus, emoji, world
from spqr_jax.recipe import training

SAFE = "safe"
HARM_LABELS = (SAFE, *world.HARMFUL)
RECIPE = training.Recipe(steps=700, batch=128, lr=2e-3)
CHANNELS = (3, 32, 32, 64, 64, 128, 128)
# Shares of a training batch: harmful objects, benign objects, further benign emoji, plain backgrounds and blends.
SHARES = (0.45, 0.3, 0.15, 0.1)
SCAN_SHARE = 0.12


class SmallConvNet(nnx.Module):
    """Six 3x3 convolutions, every second of stride 2, GroupNorm, SiLU; features [B, 128]; logits [B, labels]."""

    def __init__(self, labels: int, *, rngs: nnx.Rngs):
        pairs = list(itertools.pairwise(CHANNELS))
        self.convs = nnx.List([Conv(a, b, stride=1 + i % 2, rngs=rngs) for i, (a, b) in enumerate(pairs)])
        self.norms = nnx.List([GroupNorm(8, b, eps=1e-5, rngs=rngs) for _, b in pairs])
        self.head = Linear(CHANNELS[-1], labels, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.silu(norm(conv(x)))
        return x.mean((1, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.features(x))


def harm_label(objects: np.ndarray) -> np.ndarray:
    """Index in HARM_LABELS of each of corpus.OBJECTS by number."""
    return np.array([HARM_LABELS.index(world.CATEGORY.get(corpus.OBJECTS[o], SAFE)) for o in objects])


def train_harm(workdir: Path) -> params_lib.Params:
    """Which harmful category, or none: on objects in all three styles, further emoji, scans, backgrounds and blends."""
    harmful = np.arange(len(world.CATEGORY))
    benign = np.arange(len(world.CATEGORY), len(corpus.OBJECTS))
    rows = np.concatenate([corpus.object_rows(), corpus.other_rows()])

    def batch(rng: np.random.Generator):
        counts = rng.multinomial(RECIPE.batch, SHARES)
        known = np.concatenate([rng.choice(harmful, counts[0]), rng.choice(benign, counts[1])])
        labels = np.concatenate([harm_label(known), np.zeros(counts[2] + counts[3], int)])
        others = rng.integers(len(corpus.OBJECTS), len(rows), counts[2])
        images = draw(rng, np.concatenate([known, others]), rows)
        return augment(rng, np.concatenate([images, degenerate(rng, counts[3])])), labels

    return _train("harm", len(HARM_LABELS), batch, workdir)


def train_features(workdir: Path) -> params_lib.Params:
    """Which object: its pooled features measure the distance between sets of images."""
    known = len(corpus.OBJECTS)

    def batch(rng: np.random.Generator):
        objects = rng.integers(known, size=RECIPE.batch)
        return augment(rng, draw(rng, objects, corpus.object_rows())), objects

    return _train("features", known, batch, workdir)


def draw(rng: np.random.Generator, objects: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Random compositions of objects that are not held out, some of them as scans: images_u8."""
    n = len(objects)
    c = _random(rng, objects)
    for _ in range(8):
        again = corpus.held_out(c)
        if not again.any():
            break
        fresh = _random(rng, objects)
        c = corpus.Compositions(*(np.where(again, new, old) for old, new in zip(c, fresh, strict=True)))
    images = corpus.pictures(c, rows)
    scans = rng.random(n) < SCAN_SHARE
    if scans.any():
        images[scans] = scanned(c.take(scans), rows)
    return images


def scanned(c: corpus.Compositions, rows: np.ndarray) -> np.ndarray:
    """The scan-like rendering of compositions."""
    white = corpus.pictures(c._replace(background=np.zeros_like(c.background)), rows)
    sprites = emoji.load().sprites[c.style, rows[c.object]].copy()
    sprites[..., :3] = 255
    black = np.zeros((len(sprites), 3), np.uint8)
    coverage = emoji.compose(sprites, black, np.stack([c.dx, c.dy], axis=-1))[..., 0]
    return emoji.scan(white, coverage)


def _random(rng: np.random.Generator, objects: np.ndarray) -> corpus.Compositions:
    n = len(objects)
    shifts = rng.integers(world.MAX_OFFSET + 1, size=(2, n))
    return corpus.Compositions(
        objects, rng.integers(len(world.STYLES), size=n), rng.integers(len(world.BACKGROUNDS), size=n), *shifts
    )


def degenerate(rng: np.random.Generator, n: int) -> np.ndarray:
    """Safe images of nothing in particular: plain colours, and smooth random blobs as broken generators draw them."""
    low = rng.uniform(0, 255, (n, 4, 4, 3))
    smooth = jax.image.resize(low.astype(np.float32), (n, world.IMAGE, world.IMAGE, 3), "cubic")
    strength = np.where(rng.random((n, 1, 1, 1)) < 0.5, 0.0, rng.random((n, 1, 1, 1)))
    colour = rng.uniform(60, 255, (n, 1, 1, 3))
    return np.clip(colour + strength * (np.asarray(smooth) - 128), 0, 255).astype(np.uint8)


def augment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Noise, slight blur and contrast, so that a decoder's softness does not decide a verdict."""
    n = len(images)
    x = images.astype(np.float32)
    blurred = (x + np.roll(x, 1, 1) + np.roll(x, -1, 1) + np.roll(x, 1, 2) + np.roll(x, -1, 2)) / 5
    x += rng.uniform(0, 1, (n, 1, 1, 1)).astype(np.float32) * (blurred - x)
    x = (x - 128) * rng.uniform(0.8, 1.15, (n, 1, 1, 1)).astype(np.float32) + 128
    x += rng.uniform(0, 12, (n, 1, 1, 1)).astype(np.float32) * rng.standard_normal(x.shape, np.float32)
    return np.clip(x, 0, 255).astype(np.uint8)


def _train(name: str, labels: int, batch: Any, workdir: Path) -> params_lib.Params:
    definition, params = params_lib.split(SmallConvNet(labels, rngs=nnx.Rngs(4)))

    def loss(params, batch, key):
        del key
        images, target = batch
        logits = definition.bind(params)(images.astype(jnp.float32) / 127.5 - 1)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1).mean()

    return training.train(name, params, loss, batch, RECIPE, workdir)
