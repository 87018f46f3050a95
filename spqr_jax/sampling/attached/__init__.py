"""What stays attached to a pipeline through benign fine-tuning and acts only when it generates pictures."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spqr_jax import params as params_lib
from spqr_jax.files import checkpoint, storage
from spqr_jax.params import Params
from spqr_jax.sampling.attached.membranes import Factors, Membranes

# The published safety concept, as the authors' pipeline prompts the model with it.
UNSAFE = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, "
    "cruelty"
)


class Strength(NamedTuple):
    """Hyperparameters of Safe Latent Diffusion; the defaults are its "medium"."""

    warmup: float = 10  # evaluations of the UNet before guidance acts (momentum builds up meanwhile)
    scale: float = 1000  # s_S
    threshold: float = 0.01  # lambda
    momentum_scale: float = 0.3  # s_m
    momentum_beta: float = 0.4  # beta_m, 0..1


# Schramowski et al., CVPR 2023, table of configurations.
PRESETS = {
    "weak": Strength(15, 20, 0.0, 0.0, 0.0),
    "medium": Strength(),
    "strong": Strength(7, 2000, 0.025, 0.5, 0.7),
    "max": Strength(0, 5000, 1.0, 0.5, 0.7),
}


class SLD(NamedTuple):
    """Safe Latent Diffusion: every picture is guided away from the text `concept`."""

    concept: str = UNSAFE
    strength: Strength = PRESETS["medium"]


class Attached(NamedTuple):
    """Attributes:
    guidance: safety guidance of the sampling loop.
    delta: kernels added to the UNet's for generation, a partial tree of arrays under the UNet's names. Fine-tuning
        trains the UNet without them.
    membranes: changes of the UNet that each prompt switches on as far as it is about what they erase.
    """

    guidance: SLD | None = None
    delta: Params | None = None
    membranes: Membranes | None = None


def add(unet: Params, delta: Params | None) -> Params:
    """The UNet's weights plus `delta`, in the UNet's dtypes; both may be traced.

    Raises ValueError naming a leaf of `delta` that the UNet lacks or has in another shape.
    """
    if delta is None:
        return unet
    flat, changes = params_lib.flatten(unet), params_lib.flatten(delta)
    for path, change in changes.items():
        if path not in flat or flat[path].shape != change.shape:
            found = "no such weight" if path not in flat else f"shape {flat[path].shape}"
            raise ValueError(f"delta {path} {change.shape} does not fit the UNet ({found}); was it made for another?")
    return params_lib.unflatten(
        {p: (leaf + changes[p]).astype(leaf.dtype) if p in changes else leaf for p, leaf in flat.items()}
    )


def safety_guidance(
    strength: Strength, momentum: jax.Array, i: jax.Array, without: jax.Array, text: jax.Array, unsafe: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(gamma to subtract from the guidance direction, new momentum) at evaluation i (Schramowski et al., eq. 3-8).

    without, text, unsafe: the UNet's outputs [...] for no text, the prompt and the unsafe concept; momentum alike, zero
    at first. gamma includes the momentum term and is zero during the warm-up, as in the authors' code.
    """
    difference = text - unsafe
    weight = jnp.minimum(jnp.abs(difference) * strength.scale, 1.0)
    weight = jnp.where(difference >= strength.threshold, 0.0, weight)
    gamma = weight * (unsafe - without) + strength.momentum_scale * momentum
    momentum = strength.momentum_beta * momentum + (1 - strength.momentum_beta) * gamma
    return jnp.where(i >= strength.warmup, gamma, 0.0), momentum


def check_acts(attached: Attached | None, evaluations: int) -> None:
    """Raises ValueError for safety guidance whose warm-up outlasts a sample of so many evaluations of the UNet: such a
    model would be scored as safe or unsafe as if nothing were attached."""
    guidance = attached and attached.guidance
    if guidance and guidance.strength.warmup >= evaluations:
        raise ValueError(
            f"SLD acts after {guidance.strength.warmup:g} evaluations of the UNet, and a sample takes {evaluations}: "
            "it would never act. The presets are for 50 steps; lower the warm-up in the same proportion, with "
            'the option `strength`: {"warmup": ...}.'
        )


def save(path: Path, attached: Attached) -> None:
    """Write `attached` as a directory at `path`: the delta's and the membranes' arrays, then attached.json. Replaces
    what is there."""
    path.mkdir(parents=True, exist_ok=True)
    note = path / "attached.json"
    note.unlink(missing_ok=True)
    if attached.delta is not None:
        checkpoint.save(path / "delta", attached.delta)
    membranes = attached.membranes
    if membranes is not None:
        flat = {f"{name}.{side}": factor for name, pair in membranes.factors.items() for side, factor in pair.items()}
        checkpoint.save(path / "membranes", params_lib.unflatten(flat))
    guidance = attached.guidance
    sld = guidance and {"concept": guidance.concept, **guidance.strength._asdict()}
    said = membranes and {"targets": membranes.targets, "scaling": membranes.scaling}
    kept = {"guidance": sld, "delta": attached.delta is not None, "membranes": said}
    storage.write_text(note, json.dumps(kept, indent=2) + "\n")


def load(path: Path) -> Attached:
    """Read what `save` wrote, arrays as NumPy. Raises FileNotFoundError when nothing is there."""
    note = path / "attached.json"
    if not note.exists():
        raise FileNotFoundError(f"{note} does not exist; expected what `attached.save` writes.")
    saved = json.loads(note.read_text())
    sld = saved["guidance"]
    guidance = None if sld is None else SLD(sld.pop("concept"), Strength(**sld))
    delta = checkpoint.load(path / "delta") if saved["delta"] else None
    said = saved.get("membranes")
    if not said:
        return Attached(guidance, delta)
    factors: Factors = {}
    for name, factor in params_lib.flatten(checkpoint.load(path / "membranes")).items():
        kernel, _, side = name.rpartition(".")
        factors.setdefault(kernel, {})[side] = factor
    return Attached(guidance, delta, Membranes(tuple(said["targets"]), said["scaling"], factors))
