"""Judges in PyTorch to ONNX graphs and their sidecars, for `judges` to run without PyTorch.

`export` is the command `python -m convert judges`. `graph` traces, exports and compares one module; `clip`, `inception`
and `llavaguard` know one kind of judge each. This room may know PyTorch, transformers and `judges`, and nothing of
pipelines.
"""
