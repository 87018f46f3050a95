"""Sampling: from noise to images under guidance, as one compiled program, with what attachments do inside it.

The room knows backbones, schedulers and devices. It is used through `spqr_jax.generate`, and by methods that train on
latents part of the way to an image.
"""
