"""Masks over single weights: found from saliency, applied to gradients and updates."""

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import params as params_lib
from spqr_jax.params import Params


def apply(mask: Params | None, tree: Params) -> Params:
    """The tree with zeros where the mask is False; as it is when there is no mask."""
    if mask is None:
        return tree
    return jax.tree.map(lambda keep, leaf: jnp.where(keep, leaf, 0), mask, tree)


def check_share(name: str, share: float) -> None:
    """Raise ValueError for a share outside 0..1."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be between 0 and 1, found {share}.")


def top(scores: Params, fraction: float) -> Params:
    """True for the `fraction` of all scalars with the highest scores, ranked over the whole tree: bool like scores.

    Exactly round(fraction * count) are chosen; among equal scores the first in the order of the tree. Raises ValueError
    for a fraction outside 0..1, FloatingPointError for scores that are not finite.
    """
    check_share("the share of weights in a mask", fraction)
    flat = {path: np.asarray(leaf) for path, leaf in params_lib.flatten(scores).items()}
    everything = np.concatenate([leaf.reshape(-1) for leaf in flat.values()])
    if not np.isfinite(everything).all():
        raise FloatingPointError("saliency is not finite; check the weights and the pictures.")
    chosen = round(fraction * len(everything))
    if chosen == 0:
        return params_lib.unflatten({path: np.zeros(leaf.shape, bool) for path, leaf in flat.items()})
    threshold = np.partition(everything, -chosen)[-chosen]
    at_threshold = chosen - int((everything > threshold).sum())
    mask = {}
    for path, leaf in flat.items():
        tied = (leaf == threshold).reshape(-1)
        tied &= np.cumsum(tied) <= at_threshold
        at_threshold -= int(tied.sum())
        mask[path] = (leaf > threshold) | tied.reshape(leaf.shape)
    return params_lib.unflatten(mask)
