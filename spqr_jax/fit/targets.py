"""Named targets: accelerators that need not be there, with their memory, their peak rates, and how they are described.

Figures of TPUs: the memory is what libtpu's compiler reports as available ("Ran out of memory on HBM ... exceeds
available HBM (15.75G)", libtpu 0.0.52); peak rates are those of Google Cloud's pages "TPU v5e", "v5p" and "v6e".
Figures of NVIDIA's cards: openxla/xla, xla/backends/gpu/target_config/specs; peak rates of H100, H200 and B200 from the
matrix units that stand there (cores x units x operations x 2 x clock), of the A100 from NVIDIA's data sheet, without
sparsity.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from spqr_jax.devices import memory
from spqr_jax.devices import mesh as mesh_lib

GIB = 2**30
# XLA's own default: the share of a GPU's memory that JAX takes.
GPU_SHARE = 0.75
SPECS = "openxla/xla, xla/backends/gpu/target_config/specs"
LIBTPU = "libtpu's compiler"
TRITON = "xla_gpu_enable_triton_gemm"  # products as Triton kernels, chosen by trying them on the card
INSTALL = {"tpu": "pip install 'jax[tpu]'", "cuda": "pip install 'jax[cuda12]'"}
PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}


class Target(NamedTuple):
    """One kind and number of devices.

    Attributes:
        name: as --target takes it.
        platform: "cpu", "tpu" or "cuda".
        topology: libtpu's name of the topology ("v5e:2x2"); of a GPU the name of its description in `CARDS`.
        memory: bytes of one device; 0: those of this machine.
        source: where this number is from.
        peak: FLOP per second of one device for bfloat16 products; 0: not known.
        peak_float32: the same for float32 products as JAX computes them unless told otherwise: on TPUs in one pass of
            bfloat16, on NVIDIA's cards in TF32.
        peak_source: where the peaks are from.
        cards: how many GPUs there are, all on one host. The topology of TPUs says how many they are.
    """

    name: str
    platform: str
    topology: str = ""
    memory: int = 0
    source: str = ""
    peak: float = 0.0
    peak_float32: float = 0.0
    peak_source: str = ""
    cards: int = 1

    @property
    def limit(self) -> int:
        """Bytes that programs may take on one device. Of a GPU JAX takes the share that the environment says."""
        if self.platform == "cuda":
            return int(float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE)) * self.memory)
        return self.memory or memory.memory_limit(mesh_lib.make()) or 0


class Card(NamedTuple):
    """What differs from card to card in a GpuTargetConfigProto. Clock in GHz, bandwidth in bytes per second."""

    description: str
    major: int
    minor: int
    cores: int
    fpus: int
    bandwidth: int
    l2: int
    clock: float
    memory: int
    shared: int  # bytes of shared memory in a core
    shared_optin: int  # bytes that one block may ask for
    threads: int = 2048  # in a core


CARDS = {
    "h100": Card(
        "NVIDIA H100 80GB HBM3", 9, 0, 132, 128, 3352320000000, 52428800, 1.98, 84942979072, 233472, 232448
    ),
    "h200": Card(
        "NVIDIA H200 141GB HBM3e", 9, 0, 132, 128, 4800000000000, 52428800, 1.98, 151397597184, 233472, 232448
    ),
    "b200": Card("NVIDIA B200", 10, 0, 148, 128, 7672320000000, 132644864, 1.965, 191514411008, 233472, 232448),
    "a100-80": Card(
        "NVIDIA A100-SXM4-80GB", 8, 0, 108, 64, 2039040000000, 41943040, 1.41, 85100068864, 167936, 166912
    ),
    "a100-40": Card(
        "NVIDIA A100-SXM4-40GB", 8, 0, 108, 64, 1555200000000, 41943040, 1.41, 42331013120, 167936, 166912
    ),
    "a6000": Card("NVIDIA RTX A6000", 8, 6, 84, 128, 768096000000, 6291456, 1.8, 51041271808, 102400, 101376, 1536),
    "rtx-pro-6000": Card(
        "NVIDIA RTX PRO 6000 Blackwell", 12, 0, 188, 128, 1792000000000, 134217728, 2.6, 103079215104, 131072, 101376,
        1536,
    ),
}  # fmt: skip

# The fields that the cards share, and the libraries that jax[cuda12] brings.
DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_optin} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 name: "{description}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{description}"
"""


def _tpu(name: str, topology: str, memory: float, peak: float) -> Target:
    page = f"Google Cloud, TPU {topology.partition(':')[0]}"
    return Target(f"tpu-{name}", "tpu", topology, int(memory * GIB), LIBTPU, peak, peak, page)


def _gpu(card: str, peak: float = 0.0, source: str = SPECS, cards: int = 1) -> Target:
    name = f"{card}-{cards}" if cards > 1 else card
    return Target(name, "cuda", card, CARDS[card].memory, SPECS, peak, peak / 2, source if peak else "", cards)


_ALL = (
    Target("cpu", "cpu", source="half of this machine's memory, shared by its devices"),
    _tpu("v5e-4", "v5e:2x2", 15.75, 197e12),
    _tpu("v5e-16", "v5e:4x4", 15.75, 197e12),
    _tpu("v5e-256", "v5e:16x16", 15.75, 197e12),
    _tpu("v5p-8", "v5p:2x2x1", 95.73, 459e12),  # 8 cores, which are 4 devices
    _tpu("v6e-8", "v6e:2x4", 31.24, 918e12),
    _gpu("h100", 989e12),
    _gpu("h100", 989e12, cards=8),
    _gpu("h200", 989e12),
    _gpu("b200", 2225e12),
    _gpu("a100-80", 312e12, "NVIDIA A100 data sheet"),
    _gpu("a100-40", 312e12, "NVIDIA A100 data sheet"),
    _gpu("a6000"),
    _gpu("rtx-pro-6000"),
)
TARGETS = {target.name: target for target in _ALL}


def options(target: Target) -> dict[str, Any]:
    """What the target's compiler has to be told, beside the description."""
    if target.platform == "cuda" and CARDS[target.topology].major < 9:
        return {TRITON: False}  # it finds no tiles there without trying them on the card
    return {}


def find(name: str) -> Target:
    """The target of this name. Raises ValueError with the list."""
    if name not in TARGETS:
        raise ValueError(f"--target {name} is unknown; expected one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def mesh(target: Target) -> Mesh:
    """The target's devices along the axis `data`. They can be compiled for, and hold no arrays.

    Raises ModuleNotFoundError with the command that installs the compiler, or RuntimeError with what to do if another
    process holds it.
    """
    if target.platform == "cpu":
        return mesh_lib.make()
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS[target.platform]):
        raise ModuleNotFoundError(
            f"--target {target.name} needs the compiler of its platform, which is not installed: "
            f"{INSTALL[target.platform]}. No such device is needed."
        )
    try:
        devices = topologies.get_topology_desc(platform=target.platform, **_description(target)).devices
    except Exception as error:  # libtpu and the CUDA plugin raise several kinds
        raise RuntimeError(_reason(target, str(error))) from error
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def _description(target: Target) -> dict[str, Any]:
    """How the target is described to its compiler."""
    if target.platform == "tpu":
        return {"topology_name": target.topology}
    _start_cuda()
    text = DESCRIPTION.format(**CARDS[target.topology]._asdict())
    return {"topology_name": target.topology, "topology": f"1x1x{target.cards}", "target_config": text}


def _start_cuda() -> None:
    """Make JAX know the CUDA plugin, which it looks for when it starts its first backend."""
    jax.devices()


def _reason(target: Target, message: str) -> str:
    """What went wrong, and what to do, in one line."""
    if "lock" in message.lower() and target.platform == "tpu":
        return (
            f"--target {target.name}: another process uses libtpu, which allows one at a time; wait for it, or set "
            f"ALLOW_MULTIPLE_LIBTPU_LOAD=1 if none of them has a real TPU ({message.splitlines()[0]})."
        )
    first = message.splitlines()[0] if message else "no message"
    return f"--target {target.name} ({target.topology}): the compiler refuses the description: {first}"
