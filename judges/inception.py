"""Feature networks for the Fréchet inception distance: images_u8 -> features float32 [N, D].

The resizer alone moves the distance, so the mode of preprocessing is part of the identity. Features of two modes must
not be compared:

- pytorch-fid     bilinear to 299, no antialiasing, 2x - 1
- torch-fidelity  TensorFlow 1's bilinear to 299, (x - 128) / 128
- clean-fid       Pillow's antialiased bicubic to 299 in floating point, clipped, (x - 128) / 128
- native          as the sidecar's `input` describes (small feature networks that take images at their own size)

The usual graph is the Inception network of 2015-12-05 (1008 classes, not torchvision's): [N, 3, 299, 299] -> [N, 2048].
Resizing and scaling happen before it.
"""

import os
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from judges.answers import batches, check_choice, check_images
from judges.preprocess import InputSpec, input_name, prepare
from judges.session import JudgeError, Session, SessionOptions, in_one_line, open_session
from judges.sidecar import read_sidecar, sidecar_identity, sidecar_path

HALF, TF = (0.5,) * 3, (128 / 255,) * 3
MODES = {
    "pytorch-fid": InputSpec((299, 299), "bilinear", HALF, HALF),
    "torch-fidelity": InputSpec((299, 299), "bilinear_tf1", TF, TF),
    "clean-fid": InputSpec((299, 299), "bicubic_antialias", TF, TF),
}


class Inception:
    """A feature network: images_u8 -> float32 [N, D]; `mode` is its preprocessing."""

    def __init__(self, session: Session, spec: InputSpec, mode: str, *, batch_size: int = 32):
        self.session, self.spec, self.mode, self.batch_size = session, spec, mode, batch_size
        self.input = input_name(session, spec)
        self.output = next(iter(session.outputs))
        self.identity: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        mode: str | None = None,
        batch_size: int = 32,
        **session_options: Unpack[SessionOptions],
    ) -> "Inception":
        """Opens the feature network at `path`. mode: default the sidecar's, or pytorch-fid without a sidecar.

        Raises JudgeError for a bad graph or sidecar and ValueError for an unknown mode.
        """
        session = open_session(path, **session_options)
        sidecar = sidecar_path(Path(path))
        data = read_sidecar(sidecar) if sidecar.is_file() else {}
        mode = check_choice("mode", mode or data.get("mode", "pytorch-fid"), [*MODES, "native"])
        if mode == "native" and "input" not in data:
            raise JudgeError(f"{sidecar}: mode native needs this sidecar with an `input` object")
        spec = MODES[mode] if mode != "native" else InputSpec.from_json(data["input"], str(sidecar))
        network = cls(session, spec, mode, batch_size=batch_size)
        network.identity = {
            "judge": "inception",
            "model": data.get("model", session.path.stem),
            **session.identity(),
            **(sidecar_identity(sidecar) if data else {}),
            "options": {"mode": mode},
        }
        network.probe()
        return network

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> features float32 [N, D].

        Raises ValueError with the images whose features are not finite: a distance without them would look plausible.
        """
        images = check_images(images)
        parts = [self.features(images[part]) for part in batches(len(images), self.batch_size)]
        features = np.concatenate(parts) if parts else np.zeros((0, self.dimension), np.float32)
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise ValueError(f"{self.session.path}: non-finite features for images {broken[:10].tolist()}")
        return features

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of one batch, float32 [N, D]; trailing axes of size one ([N, D, 1, 1]) are dropped."""
        features = self.session.run({self.input: prepare(images, self.spec)}, [self.output])[0]
        return features.reshape(len(images), -1).astype(np.float32)

    def probe(self) -> None:
        """Runs one black image: finds D, and a wrong input size is an error when the network is opened."""
        height, width = self.spec.size or (64, 64)
        try:
            self.dimension = self.features(np.zeros((1, height, width, 3), np.uint8)).shape[1]
        except Exception as error:
            raise JudgeError(
                f"{self.session.path}: does not take the input of mode {self.mode} ({in_one_line(error)})"
            ) from error
