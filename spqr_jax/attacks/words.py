"""Pseudo words of attacks: those that textual inversion learns too."""

from spqr_jax.training.words import ENCODER, TOKENIZER, added

__all__ = ["ENCODER", "TOKENIZER", "added"]
