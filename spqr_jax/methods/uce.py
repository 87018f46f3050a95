"""UCE, Unified Concept Editing (Gandikota et al., WACV 2024): a closed-form edit of cross-attention."""

import numpy as np

from spqr_jax import backbones
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools.closed_form import (
    Edit,
    key_value_matrices,
    pooled_matrices,
    solve,
    text_states,
    with_kernels,
)
from spqr_jax.methods.tools.concepts import checked, expanded
from spqr_jax.pipeline import Pipeline


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    variant: str = "v1",
    ridge: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float | None = None,
    expand: bool = False,
    progress: bool = False,
) -> Pipeline:
    """Make erased texts produce the target's keys and values.

    Args:
        variant: "v1" (2023, the basis of most published nudity baselines): one term per token position from the last
            word on, "" always preserved; "v2" (2025): one term per text, at its last word. The authors have SDXL in
            "v2" alone.
        ridge: weight of staying near the original matrices (lambda in the code, 0.5).
        erase_scale: weight of each erased text's terms.
        preserve_scale: weight of the preserved texts; default max(0.1, 1 / number of them) (v1), 1 (v2).
        expand: also erase the texts within the concept's templates, `tools.concepts.expanded`.

    FLUX and SD3: "v2" alone, as the authors have it for FLUX (uce_flux_edit.py): the kernel that text states go through
    takes a term for the text's last word under T5 (SD3: and one under CLIP), and the first kernel of the pooled state
    takes one for that. Their code adds the layer's bias to the target of a product that has none; ours does not.

    Deterministic and quick: `seed` and `progress` are accepted as by every method, and not used. Solved in float64, the
    original in float32. SDXL's pooled text path is not edited, as in the original.
    """
    del seed, progress
    concept = expanded(concept, pipeline) if expand else checked(concept, pipeline)
    kernels, pooled = key_value_matrices(pipeline, "UCE"), pooled_matrices(pipeline)
    if pooled and variant == "v1":
        raise ValueError(
            f'UCE for {backbones.of(pipeline).name} is variant "v2" alone, as its authors have it for flow '
            'transformers; set the option variant to "v2".'
        )
    edits = _edits(pipeline, concept, variant, erase_scale, preserve_scale)
    edited = {path: _solved(kernel, edits, ridge) for path, kernel in kernels.items()}
    if pooled:
        of_pooled = _pooled_edits(pipeline, concept, erase_scale, 1.0 if preserve_scale is None else preserve_scale)
        edited |= {path: _solved(kernel, of_pooled, ridge) for path, kernel in pooled.items()}
    return with_kernels(pipeline, edited)


def _solved(kernel: np.ndarray, edits: list[Edit], ridge: float) -> np.ndarray:
    return solve(kernel, edits, [edit.sources @ kernel for edit in edits], ridge)


def _pooled_edits(pipeline: Pipeline, concept: Concept, erase_scale: float, preserve_scale: float) -> list[Edit]:
    """One term for the pooled state of each text, as variant "v2"."""
    preserve = list(dict.fromkeys(concept.preserve))
    texts = [*concept.erase, concept.target.strip(), *preserve]
    states = np.asarray(backbones.condition(pipeline, texts).pooled, np.float64)[:, None]
    erased, guide, kept = np.split(states, [len(concept.erase), len(concept.erase) + 1])
    changed = [Edit(state, guide[0], np.full(1, erase_scale)) for state in erased]
    return changed + [Edit(state, state, np.full(1, preserve_scale)) for state in kept]


def _edits(
    pipeline: Pipeline, concept: Concept, variant: str, erase_scale: float, preserve_scale: float | None
) -> list[Edit]:
    if variant not in ("v1", "v2"):
        raise ValueError(f'UCE variant must be "v1" or "v2", found {variant!r}.')
    preserve = list(dict.fromkeys([*concept.preserve, *([""] if variant == "v1" else [])]))
    if preserve_scale is None:
        preserve_scale = max(0.1, 1 / len(preserve)) if variant == "v1" else 1.0
    target = concept.target if variant == "v1" else concept.target.strip()
    states = text_states(pipeline, [*concept.erase, target, *preserve])
    guide = states[len(concept.erase)]
    kept = states[len(concept.erase) + 1 :]
    j = _last_words(pipeline, target)[0]
    edits = []
    for text, state in zip(concept.erase, states, strict=False):
        i = _last_words(pipeline, text)[0]
        if variant == "v2":
            inputs, sources = (of[_last_words(pipeline, name)] for of, name in ((state, text), (guide, target)))
        else:
            # Rows from the last word to the end, paired in order; the longer start decides how many there are.
            rows = len(state) - max(i, j)
            inputs, sources = state[i : i + rows], guide[j : j + rows]
        edits.append(Edit(inputs, sources, np.full(len(inputs), erase_scale)))
    for text, state in zip(preserve, kept, strict=True):
        rows = state if variant == "v1" else state[_last_words(pipeline, text)]
        edits.append(Edit(rows, rows, np.full(len(rows), preserve_scale)))
    return edits


def _last_words(pipeline: Pipeline, text: str) -> list[int]:
    return list(backbones.of(pipeline).last_words(pipeline, text))


METHOD = Method("uce", "UCE", align)
