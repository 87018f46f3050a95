"""A concept, and comparisons with PyTorch that are the same for methods on SD3 and on FLUX."""

import numpy as np
import pytest
import torch

from spqr_jax import backbones, methods
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import negative_guidance
from spqr_jax.params import flatten, unflatten

LENGTH = 8  # tokens for T5
CONCEPT = Concept(
    "test",
    erase=("nude", "the dog"),
    target="a cat",
    preserve=("a dog", "eat"),
    prompts=("nude dog", "a nude"),
    replacements=("a dog", "a cat"),
)
SMALL = {
    "esd": {"steps": 2, "sampling_steps": 2, "method": "esd-x", "lr": 1e-3},
    "modular_lora": {"steps": 2, "sampling_steps": 2, "rank": 2, "merged": True, "lr": 1e-2},
    "safety_dpo": {"steps": 2, "sampling_steps": 2, "rank": 2, "images": 2, "batch_size": 2, "lr": 1e-2},
}
REGION = {"esd": "cross_attention", "modular_lora": "lora", "safety_dpo": "lora"}


def changed(before, after) -> set[str]:
    one, two = flatten(before.params["transformer"]), flatten(after.params["transformer"])
    return {path for path in one if not np.array_equal(one[path], two[path])}


def uce_by_authors(weight: torch.Tensor, rows: dict[str, torch.Tensor]) -> np.ndarray:
    """W* of uce_flux_edit.py in float64, without the bias that its targets have. rows: text -> its states [R, d]."""
    weight = weight.double()
    right, gram = 0.5 * weight, 0.5 * torch.eye(weight.shape[1], dtype=torch.float64)
    pairs = [(text, CONCEPT.target) for text in CONCEPT.erase] + [(text, text) for text in CONCEPT.preserve]
    for text, source in pairs:
        for c, v in zip(rows[text].double(), rows[source].double(), strict=True):
            right = right + torch.outer(weight @ v, c)
            gram = gram + torch.outer(c, c)
    return (right @ torch.inverse(gram)).numpy().T


def check_uce(pipe, pipeline, states) -> None:
    """states: a text -> (its last words' states [R, d], its pooled states [1, p]), by diffusers."""
    edited = methods.METHODS["uce"].align(pipeline, CONCEPT, variant="v2")
    layers = {"context_embedder": 0, "time_text_embed.text_embedder.linear_1": 1}
    assert changed(pipeline, edited) == {f"{layer}.kernel" for layer in layers}
    found = {text: states(text) for text in (*CONCEPT.erase, CONCEPT.target, *CONCEPT.preserve)}
    for layer, place in layers.items():
        weight = pipe.transformer.get_submodule(layer).weight.detach()
        expected = uce_by_authors(weight, {text: both[place] for text, both in found.items()})
        start, ours = (flatten(p.params["transformer"])[f"{layer}.kernel"] for p in (pipeline, edited))
        assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected - start).max()


def check_loss_of_esd(pipe, pipeline, latents: np.ndarray, times: np.ndarray, predict) -> None:
    """The loss for two latents, with a student of another bias. predict: texts -> diffusers' prediction."""
    denoiser, weights, eta = backbones.denoiser(pipeline), pipeline.params["transformer"], 1.5
    told = negative_guidance.encode(pipeline, CONCEPT.erase)
    text, empty = told.rows(np.array([0, 1])), told.rows(np.array([2, 2]))
    moved = {path: leaf * 1.1 if path == "proj_out.bias" else leaf for path, leaf in flatten(weights).items()}
    student, frozen = (denoiser.bind(tree) for tree in (unflatten(moved), weights))
    ours = float(negative_guidance.erasing_loss(student, frozen, latents, times, text, empty, eta))
    with_text, without = predict(list(CONCEPT.erase)), predict(["", ""])
    bias = pipe.transformer.proj_out.bias
    start = bias.data.clone()
    bias.data = start * 1.1
    learned = predict(list(CONCEPT.erase))
    bias.data = start
    theirs = torch.nn.functional.mse_loss(learned, without - eta * (with_text - without))
    assert ours == pytest.approx(float(theirs), rel=1e-5)


def changed_by(pipeline, name: str) -> tuple[set[str], set[str]]:
    """(paths that two steps of a method change, paths of the region that it trains); all weights are finite."""
    tuned = methods.METHODS[name].align(pipeline, CONCEPT, seed=0, **SMALL[name])
    assert all(np.isfinite(leaf).all() for leaf in flatten(tuned.params["transformer"]).values())
    region = getattr(backbones.of(pipeline).regions, REGION[name])
    return changed(pipeline, tuned), {path for path in flatten(pipeline.params["transformer"]) if region.search(path)}


def check_refused(pipeline, name: str, backbone: str) -> None:
    """In one line that names the backbone (a pattern)."""
    method = methods.METHODS[name]
    with pytest.raises(ValueError, match=backbone) as caught:
        method.check_backbone(pipeline)
        method.align(pipeline, CONCEPT, seed=0)
    assert "\n" not in str(caught.value)
