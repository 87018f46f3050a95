"""Deterministic samplers as tables and pure step functions, and the forward processes of training (`ddpm`, `flow`).

This room may know NumPy and JAX, and no other room. It knows neither models nor guidance: a sampler gets the output of
a model and returns the next latents. `create` turns a diffusers scheduler_config.json dict into a NamedTuple of tables
whose methods run inside jit:

    scheduler = schedulers.create("pndm", config, num_steps)
    def body(carry, i):
        latents, state = carry
        output = model(scheduler.scale_input(latents, i), jnp.asarray(scheduler.timesteps)[i])
        return scheduler.step(state, output, i, latents), None
    latents = noise * scheduler.init_noise_sigma
    carry = latents, scheduler.init_state(latents)
    (latents, _), _ = jax.lax.scan(body, carry, jnp.arange(len(scheduler.timesteps)))

Latents are float32 of any shape. All computation is in float32, for model outputs of every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spqr_jax.schedulers import ddim, dpmpp, euler, flow, flow_euler, pndm
from spqr_jax.schedulers.flow import SPACED, Spacing

Scheduler = ddim.DDIM | dpmpp.DPMPP | euler.Euler | flow_euler.FlowEuler | pndm.PNDM

_CREATE: dict[str, Callable[[Mapping[str, Any], int], Scheduler]] = {
    "pndm": pndm.create,
    "ddim": ddim.create,
    "euler": euler.create,
    "dpmpp": dpmpp.create,
}
FLOW = flow.NAME
NAMES = (*_CREATE, FLOW)


def create(name: str, config: Mapping[str, Any], num_steps: int, spacing: Spacing = SPACED) -> Scheduler:
    """Tables of scheduler `name`, one of `NAMES`, for `num_steps` steps, 1..T.

    config: a diffusers scheduler_config.json as a dict. It may have been written for another class of the same family,
    as diffusers' from_config allows. Absent fields take the defaults of this scheduler's diffusers class. spacing: what
    a pipeline of flow matching adds to it, read by "flow_euler" alone.

    The result has `timesteps` [E], int32 (float32 where they are fractional: "euler" with linspace, "flow_euler"), the
    float `init_noise_sigma`, and the methods `init_state(latents)`, `scale_input(latents, i)` and
    `step(state, model_output, i, latents)`. There i is an index into `timesteps`, and may be traced. Raises ValueError
    for an unknown name, and for the value of a field that is not implemented.
    """
    if name not in NAMES:
        raise ValueError(f"scheduler {name!r} is unknown; expected one of {', '.join(NAMES)}")
    return flow_euler.create(config, num_steps, spacing) if name == FLOW else _CREATE[name](config, num_steps)
