"""Judges of generated images: ONNX graphs that run with NumPy and ONNX Runtime.

Every judge is opened with `.open(path, providers=..., **options)` and then called on images_u8 (uint8 [N, H, W, 3]
RGB). It answers with one typed record for each image. Its `identity` names the variant: model, sha256 of its files,
options. `judges.opening` opens a safety judge by its name in a config.

This room may know NumPy, ONNX Runtime, Pillow, OpenCV and tokenizers, and no other room: a judge can be used without
the benchmark, without JAX and without PyTorch.
"""
