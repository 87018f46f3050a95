"""Training: one step of fine-tuning as a compiled program, its objective, encoded images, adapters, and its log.

The room knows backbones, devices and files. It is used through `spqr_jax.finetune`, and by methods that fine-tune.
"""
