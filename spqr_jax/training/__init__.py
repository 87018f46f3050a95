"""Training: the compiled step of fine-tuning, its objective, adapters, encoded images, and the log.

This room may know backbones, devices, files and data. It is used by `spqr_jax.finetune`, and by methods that train.
"""
