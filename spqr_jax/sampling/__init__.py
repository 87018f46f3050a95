"""Sampling: from noise to images under guidance, as one compiled program in which attachments take part.

This room may know backbones, schedulers, devices and files. It is used by `spqr_jax.generate`, and by methods that
train on latents part of the way from noise to an image.
"""
