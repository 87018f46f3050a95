"""The Frechet distance of generated images to the reference images of a run."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spqr_jax import score
from spqr_jax.files import layout, storage
from spqr_jax.score import stats

Distance = Callable[[NDArray[np.float32]], stats.FrechetInfluence]  # of features [N, D]


def distance_to_reference(workdir: Path, judged: Any, name: str) -> Distance | None:
    """Function from features to their distance to the reference images of a run. None for a run without them.

    judged: the identity of the network that computed the features of `name`, None where it is not known.
    Raises ValueError where another network computed the features of the reference.
    """
    path = layout.Workdir(workdir).reference_features
    if not path.exists():
        return None
    arrays = storage.read_npz(path)
    made = json.loads(str(arrays["identity"]))[0] if "identity" in arrays else None
    if made is not None and judged is not None and made != judged:
        raise ValueError(
            f"{path} was computed by {made}, the features of {name} by {judged}: their distance means "
            "nothing; remove the file and run the judge stage again"
        )
    with storage.local_copy(path) as file:  # on an object store the statistics are not kept
        return distance_to(score.cached_statistics(file, layout.reference_statistics(file)))


def distance_to(reference: score.FeatureStatistics) -> Distance:
    """Function from features [N, D] to their distance to the reference and the influence of each image on it.

    The distance of the same features is computed once: the images before fine-tuning are the same in every cell of a
    subject, and with D = 2048 a distance takes seconds.
    """
    root = score.matrix_root(reference.sigma)
    known: dict[bytes, stats.FrechetInfluence] = {}

    def distance(features: NDArray[np.float32]) -> stats.FrechetInfluence:
        if features.shape[1:] != reference.mu.shape:
            raise ValueError(
                f"benign features have shape {features.shape}, the reference {reference.mu.shape}: "
                "compute both with the same feature extractor"
            )
        digest = hashlib.sha256(np.ascontiguousarray(features).tobytes()).digest()
        if digest not in known:
            known[digest] = stats.frechet_influence(features, reference, reference_root=root)
        return known[digest]

    return distance
