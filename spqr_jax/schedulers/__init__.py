"""Deterministic samplers as tables and pure step functions, and the DDPM forward process (`ddpm`) for training.

`create` turns a diffusers scheduler_config.json dict into a NamedTuple of tables whose methods run inside jit:

    scheduler = schedulers.create("pndm", config, num_steps)
    def body(carry, i):
        latents, state = carry
        output = model(scheduler.scale_input(latents, i), jnp.asarray(scheduler.timesteps)[i])
        return scheduler.step(state, output, i, latents), None
    latents = noise * scheduler.init_noise_sigma
    carry = latents, scheduler.init_state(latents)
    (latents, _), _ = jax.lax.scan(body, carry, jnp.arange(len(scheduler.timesteps)))

Latents are float32 of any shape; everything is computed in float32 whatever dtype the model output has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spqr_jax.schedulers import ddim, dpmpp, euler, pndm

Scheduler = ddim.DDIM | dpmpp.DPMPP | euler.Euler | pndm.PNDM

_CREATE: dict[str, Callable[[Mapping[str, Any], int], Scheduler]] = {
    "pndm": pndm.create,
    "ddim": ddim.create,
    "euler": euler.create,
    "dpmpp": dpmpp.create,
}
NAMES = tuple(_CREATE)


def create(name: str, config: Mapping[str, Any], num_steps: int) -> Scheduler:
    """Tables of scheduler `name` ("pndm", "ddim", "euler" or "dpmpp") for `num_steps` steps, 1..T.

    config: a diffusers scheduler_config.json as a dict, of this scheduler's class or of another of its family (as with
    diffusers' from_config); absent fields take the defaults of this scheduler's diffusers class. The result has
    `timesteps` [E] (int32; float32 for Euler with linspace, whose timesteps are fractional), `init_noise_sigma`, a
    float, and methods `init_state(latents)`, `scale_input(latents, i)`, `step(state, model_output, i, latents)` with i
    an index (may be traced) into `timesteps`. ValueError for an unknown name or a field value that is not implemented.
    """
    if name not in _CREATE:
        raise ValueError(f"scheduler {name!r} is unknown; expected one of {', '.join(NAMES)}")
    return _CREATE[name](config, num_steps)
