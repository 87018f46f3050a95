"""Attacks: one file each, that search for a way back to a concept that was erased from a pipeline.

They measure how thoroughly a method erases: a concept that an attack brings back was hidden, not removed. An attack may
know methods' tools, training, sampling and backbones, and makes its images with `spqr_jax.generate`; it knows nothing
of configs, runs, judges or scores. It finds prompts, words or starts of sampling (`base.Attacked`), and whether their
images show the concept is for judges to say.

`attack(pipeline, prompts, concept, *, seed, target, ...) -> Attacked`: arguments that mean the same in all of them:
    pipeline: the model under attack, which is not changed.
    prompts: N texts that should show the concept; each is answered by one of its own.
    concept: what was erased from the pipeline; its texts are what an attack knows of it.
    seed: of everything that is drawn at random. A prompt's share depends on its text alone.
    target: the model before the concept was erased, of the same architecture.
    progress: whether to show a progress bar.
"""

import importlib

from spqr_jax.attacks.base import Attack, Attacked, defaults, options

# The attacks that a config may name, and their modules, which are imported when they are named.
ATTACKS: dict[str, str] = {
    name: f"spqr_jax.attacks.{name}"
    for name in ("unlearndiffatk", "p4d", "ring_a_bell", "mma", "inversion", "latent_inversion")
}

__all__ = ["ATTACKS", "Attack", "Attacked", "defaults", "find", "options"]


def find(name: str) -> Attack:
    """The attack of this name. Raises ValueError for a name that is not one of ATTACKS."""
    if name not in ATTACKS:
        raise ValueError(f"attack {name!r} is unknown; expected one of {', '.join(ATTACKS)}.")
    return importlib.import_module(ATTACKS[name]).ATTACK
