"""Weights in, weights out: the only package that may import torch, and only for pickled files."""

from convert.diffusers_dir import save_diffusers
from convert.loading import load
from convert.recognition import Recognised, recognise
from convert.rename import ConversionError

__all__ = ["ConversionError", "Recognised", "load", "recognise", "save_diffusers"]
