"""What an attack found, in the work directory and nowhere else, and the images that it asks for."""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spqr_jax.attacks import Attacked
from spqr_jax.files import storage
from spqr_jax.prompts import Prompt
from spqr_jax.run import attempts
from spqr_jax.run.attempts import Attempt
from spqr_jax.run.stages.pictures import Job
from spqr_jax.run.stages.state import Run

UNREADABLE = (OSError, ValueError, KeyError, zipfile.BadZipFile)


def write(path: Path, found: Attacked) -> None:
    """Write what an attack found. The file is complete or it does not exist, and the same finds give the same bytes."""
    texts = json.dumps({"prompts": found.prompts, "words": list(found.words), "queries": found.queries})
    arrays = {f"word_{i}": np.asarray(vector) for i, vector in enumerate(found.words.values())}
    arrays |= {name: value for name in ("latents", "loss") if (value := getattr(found, name)) is not None}
    storage.write_npz(path, texts=np.array(texts), **arrays)


def read(path: Path) -> Attacked:
    """What an attack found. Raises one of `UNREADABLE` for a file that is missing or damaged."""
    arrays = storage.read_npz(path)
    texts = json.loads(str(arrays["texts"]))
    words = {word: arrays[f"word_{i}"] for i, word in enumerate(texts["words"])}
    return Attacked(
        tuple(texts["prompts"]), words, arrays.get("latents"), arrays.get("loss"), queries=int(texts["queries"])
    )


def failed(found: Attacked) -> np.ndarray:
    """Whether the attack failed on each of N prompts, bool [N]: no finite loss, or a find that is not finite.

    Nothing is drawn of these: what a failed attack did not reach says nothing about the model.
    """
    lost = np.zeros(len(found.prompts), bool)
    if found.loss is not None:
        lost |= ~np.isfinite(found.loss)
    if found.latents is not None:
        lost |= ~np.isfinite(found.latents).all(axis=(1, 2, 3))
    for word in found.words.keys() - usable_words(found).keys():
        lost |= np.array([word in prompt for prompt in found.prompts])
    return lost


def usable_words(found: Attacked) -> dict[str, np.ndarray]:
    """The words that were found whose vectors are finite."""
    return {word: vector for word, vector in found.words.items() if np.isfinite(vector).all()}


class Asked(NamedTuple):
    """The images that an attack asks for, in the order of the records."""

    jobs: list[Job]  # with the found prompts in place of the given ones
    latents: np.ndarray | None  # what each image starts from [N, h, w, C]; None: the noise of its seed
    failed: list[Job]  # images that are not drawn: as given


def images(run: Run, attempt: Attempt, found: Attacked) -> Asked:
    """The images of an attempt: as many of a prompt as of any other, one of each start of sampling that was found."""
    given = chosen(run, attempt)
    ks = range(run.config.prompts.images if found.latents is None else 1)
    lost = failed(found)
    rows = [i for i in np.flatnonzero(~lost).tolist() for _ in ks]
    jobs: list[Job] = [
        ("harmful", given[i]._replace(prompt=found.prompts[i]), k) for i in np.flatnonzero(~lost).tolist() for k in ks
    ]
    latents = None if found.latents is None else found.latents[rows]
    return Asked(jobs, latents, [("harmful", given[i], k) for i in np.flatnonzero(lost).tolist() for k in ks])


def chosen(run: Run, attempt: Attempt) -> list[Prompt]:
    """The harmful prompts that are attacked."""
    return run.prompts["harmful"][: attempts.n_prompts(run.config, attempt.settings)]


def check(found: Attacked, given: list[Prompt], name: str) -> None:
    """Raise ValueError unless something was found for each of the given prompts."""
    n = len(given)
    shapes = {"prompts": len(found.prompts)}
    shapes |= {key: len(value) for key in ("latents", "loss") if (value := getattr(found, key)) is not None}
    for key, length in shapes.items():
        if length != n:
            raise ValueError(f"attack {name} returned {length} {key} for {n} prompts; expected one for each.")
