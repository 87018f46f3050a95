"""Judges of generated pictures: ONNX graphs run with NumPy and ONNX Runtime, no PyTorch.

Every judge is opened with `.open(path, providers=..., **options)` and then called on
images_u8 (uint8 [N, H, W, 3] RGB). It answers with one typed record for each picture, and its
`identity` says exactly which variant it is (model, file sha256, options).
"""
