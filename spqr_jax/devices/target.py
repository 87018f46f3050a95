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
