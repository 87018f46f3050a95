"""Judges from PyTorch as ONNX graphs."""
