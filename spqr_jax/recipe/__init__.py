"""The recipe of the emoji world: how its assets, model and judges were made, for whoever wants to make them again.

`python -m spqr_jax.recipe.build` does it all. This room may use every other room; no run needs it, and no other room
uses it.
"""
