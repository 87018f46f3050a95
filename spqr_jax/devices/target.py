"""The target of a program: what it is compiled for, which need not be what this process runs on.

A layer that has one formulation for CPUs and another for accelerators reads its target, an attribute of the layer and
so a part of the model's definition, and of every program that is compiled from it.
"""

import dataclasses

import jax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Target:
    """What a model is compiled for; hashable.

    Attributes:
        platform: "cpu", "cuda", "rocm" or "tpu".
        mesh: the devices that batches are split over along the axis `data`, where a kernel must know them, else
            None. The compiler divides everything among devices but the kernels of a TPU, which are not used without.
    """

    platform: str = "cpu"
    mesh: Mesh | None = None


CPU = Target()

# XLA for GPUs rewrites a program that takes more than the card has, instruction by instruction. That takes many minutes
# and ends just below XLA's own limit, which is above ours (`devices.memory.SHARE`) where JAX takes its usual share of
# the card. So the rewritten program would not be taken either: a step that is too large is computed in another way
# (`spqr_jax.training.memory`).
_WITHOUT_OWN_REMAT = {"xla_disable_hlo_passes": "rematerialization"}


def step_options(platform: str) -> dict[str, str]:
    """What the compiler of a platform is told for a training step, as jax.jit's `compiler_options`."""
    return _WITHOUT_OWN_REMAT if platform in ("cuda", "rocm") else {}


def here() -> Target:
    """One device of the kind that this process computes on."""
    return Target(_platform(jax.devices()[0]))


def of(mesh: Mesh) -> Target:
    """The devices of a mesh."""
    platform = _platform(mesh.devices.flat[0])
    return Target(platform, mesh if platform == "tpu" else None)


def _platform(device: jax.Device) -> str:
    """JAX says "gpu" of every vendor's; only the version of its client tells them apart."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
