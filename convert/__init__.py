"""Weights from other libraries into our parameters, and back into a directory that diffusers can load.

`load` reads every form in which checkpoints are published, `save_diffusers` writes a diffusers directory, `recognise`
names the kind of a file. `convert.graphs` exports judges to ONNX. This room is the only one that may import PyTorch:
for pickled files, and for exporting graphs. It may know parameters, pipelines and backbones, and nothing of methods or
runs.
"""

from convert.diffusers_dir import save_diffusers
from convert.loading import load
from convert.recognition import Recognised, recognise
from convert.rename import ConversionError

__all__ = ["ConversionError", "Recognised", "load", "recognise", "save_diffusers"]
