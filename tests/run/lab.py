"""The text of a module with a method of a user's own."""

ERASE = """
import jax

def erase(pipeline, concept, *, seed, strength=0.5):
    unet = jax.tree.map(lambda weight: weight * strength, pipeline.params["unet"])
    return pipeline.with_params(unet=unet)
"""
