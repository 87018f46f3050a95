"""Membranes that each prompt switches on: pictures of one batch against pipelines merged for one prompt at a time."""

import numpy as np
import pytest

pytest.importorskip("torch")

import convert
from spqr_jax import data, finetune
from spqr_jax import params as params_lib
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.generate import generate
from spqr_jax.methods import Concept, spm
from spqr_jax.methods.spm import Membrane
from spqr_jax.methods.tools import low_rank
from spqr_jax.methods.tools.low_rank import LowRank
from spqr_jax.sampling import attached
from spqr_jax.sampling.attached.membranes import Membranes
from spqr_jax.sampling.attached.safe_guidance import SLD

PROMPTS = ["the cat", "a dog eats", "nude"]
LATENTS = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)
OPTIONS = {"steps": 3, "scheduler": "ddim", "latents": LATENTS}


def loaded(reference, family):
    pipeline = convert.load(reference(family)[1])
    scheduler = pipeline.configs["scheduler"] | {"clip_sample": False}
    return pipeline._replace(configs=pipeline.configs | {"scheduler": scheduler})


def trained(pipeline):
    """Two membranes large enough to be seen."""
    rng, found = np.random.default_rng(1), []
    for seed, text in enumerate(("cat", "nude")):
        adapter = low_rank.create(pipeline.params["unet"], STABLE_DIFFUSION.regions.transformer, rank=2, seed=seed)
        ups = {p: 0.3 * rng.standard_normal(a.up.shape).astype(np.float32) for p, a in adapter.items()}
        found.append(Membrane(text, {p: LowRank(a.down, ups[p]) for p, a in adapter.items()}, scale=0.5))
    return found


def check(pipeline, membranes, scaling, **options):
    """Every picture of a batch is that of the pipeline merged for its prompt."""
    options, parts = OPTIONS | options, (spm.kept_apart(membranes, scaling),)
    ours = generate(pipeline._replace(attached=parts), PROMPTS, [0] * 3, **options)
    plain = generate(pipeline, PROMPTS, [0] * 3, **options)
    for i, prompt in enumerate(PROMPTS):
        merged = spm.transported(pipeline, membranes, prompt, scaling=scaling)
        alone = generate(merged, [prompt], [0], **options | {"latents": LATENTS[i : i + 1]})[0]
        difference = np.abs(ours[i].astype(int) - alone)
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.02, prompt
        assert (np.abs(plain[i].astype(int) - alone) > 1).mean() > 0.1, prompt


@pytest.fixture(scope="module")
def pipeline(reference):
    return loaded(reference, "sd1")


@pytest.fixture(scope="module")
def membranes(pipeline):
    return trained(pipeline)


@pytest.mark.parametrize("scaling", ["paper", "code"])
def test_each_prompt_switches_membranes_on_in_one_batch(pipeline, membranes, scaling):
    check(pipeline, membranes, scaling)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["paper", "code"])
def test_on_sdxl_and_without_guidance(reference, pipeline, membranes, scaling):
    xl = loaded(reference, "sdxl")
    check(xl, trained(xl), scaling)
    check(pipeline, membranes, scaling, guidance=1.0)


def test_beside_safety_guidance_and_over_batches(pipeline, membranes):
    """Three texts a picture, and a padded last batch: the pictures of one batch without padding."""
    safe = pipeline._replace(attached=(SLD(), spm.kept_apart(membranes, "paper")))
    whole, parts = (generate(safe, PROMPTS, [0] * 3, **OPTIONS, batch_size=size) for size in (3, 2))
    assert np.abs(whole.astype(int) - parts).max() <= 1
    merged = spm.transported(pipeline, membranes, PROMPTS[0])._replace(attached=(SLD(),))
    alone = generate(merged, PROMPTS[:1], [0], **OPTIONS | {"latents": LATENTS[:1]})
    assert np.abs(whole[0].astype(int) - alone[0]).max() <= 1


def test_align_keeps_them_apart_from_the_weights(pipeline, tmp_path):
    """In files too, and through benign fine-tuning."""
    options = {"seed": 6, "steps": 2, "sampling_steps": 3, "eighths": (8,), "warmup": 0}
    concept = Concept("both", ("cat", "nude"))
    kept = spm.align(pipeline, concept, transport="paper", strength=2.0, **options)
    assert kept.params is pipeline.params
    found = attached.find(kept, Membranes)
    assert found.targets == ("cat", "nude") and found.scaling == "paper"
    single = [spm.train(pipeline, text, **options | {"seed": 6 + i}) for i, text in enumerate(concept.erase)]
    path = next(path for path in found.factors if path.endswith("proj_in.kernel"))
    for i, membrane in enumerate(single):
        down, up = membrane.adapter[path]
        np.testing.assert_array_equal(found.factors[path]["down"][i], down.reshape(down.shape[-2:]))
        np.testing.assert_array_equal(found.factors[path]["up"][i], 2 * np.asarray(up))
    attached.save(tmp_path / "kept", kept.attached)
    (read,) = attached.load(tmp_path / "kept")
    assert read.targets == found.targets and read.scaling == "paper" and set(read.factors) == set(found.factors)
    for name, pair in found.factors.items():
        for side, factor in pair.items():
            np.testing.assert_array_equal(read.factors[name][side], factor)
    dataset = data.from_arrays(np.zeros((4, 16, 16, 3), np.uint8), ["a cat"] * 4)
    tuned, base = (
        finetune.finetune(p, dataset, "moderate", steps=1, batch_size=2, optimiser=finetune.Optimiser(lr=1e-2))
        for p in (kept, pipeline)
    )
    assert tuned.attached is kept.attached
    flat = params_lib.flatten(base.params["unet"])
    assert all(np.array_equal(leaf, flat[p]) for p, leaf in params_lib.flatten(tuned.params["unet"]).items())
    with pytest.raises(ValueError, match="membranes are attached to this pipeline already"):
        spm.align(kept, concept, transport="code")
    with pytest.raises(ValueError, match=r'transport must be .*found "?\'half\''):
        spm.align(pipeline, concept, transport="half")
