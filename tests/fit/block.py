"""One block of a UNet with its gradient, compiled for a target: `python -m tests.fit.block tpu-v5e-4`.

A residual block, and a transformer block over 1,152 tokens: the smallest program with everything that a training step
has. Prints what it consists of as JSON.
"""

import os

from spqr_jax.fit.environment import ENVIRONMENT

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})

import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import Conv
from spqr_jax.backbones.models.unet import Transformer2DModel
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import target as target_lib
from spqr_jax.fit import hlo, targets

HEIGHT, WIDTH, CHANNELS = 36, 32, 32


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = Conv(CHANNELS, CHANNELS, rngs=rngs)
        self.transformer = Transformer2DModel(CHANNELS, 2, CHANNELS, 1, linear=True, groups=8, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        return self.transformer(self.conv(x), context)


def step(definition, params, x, context):
    """A training step in bfloat16 over float32 masters."""

    def loss(masters):
        out = definition.bind(params_lib.cast(masters, jnp.bfloat16))(x, context)
        return jnp.square(out.astype(jnp.float32)).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda leaf, gradient: leaf - 1e-3 * gradient, params, gradients)


def main(name: str) -> None:
    mesh = targets.mesh(targets.find(name))
    model = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
    model.set_attributes(target=target_lib.of(mesh), raise_if_not_found=False)
    definition, params = params_lib.split(model)
    params = mesh_lib.shapes(params, mesh)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    shapes = (mesh.size, HEIGHT, WIDTH, CHANNELS), (mesh.size, 77, CHANNELS)
    batch = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows) for shape in shapes)
    lowered = jax.jit(step, static_argnums=0, donate_argnums=1).trace(definition, params, *batch).lower()
    leaves = [leaf.size for leaf in jax.tree.leaves(params)]
    print(json.dumps(hlo.counts(lowered, lowered.compile()) | {"elements": sum(leaves), "leaves": len(leaves)}))


if __name__ == "__main__":
    if sys.argv[1] == "cpu":
        mesh_lib.split_cpu(4)
    main(sys.argv[1])
