"""What is attached to a pipeline: Safe Latent Diffusion against diffusers' own, added kernels, and their files."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convert
from configs import mini
from spqr_jax import data, finetune
from spqr_jax import params as params_lib
from spqr_jax.config import Subject
from spqr_jax.generate import generate
from spqr_jax.methods import Concept, sld
from spqr_jax.run import opening, stages
from spqr_jax.run.stages.align import load_subject
from spqr_jax.sampling import attached, sampler
from spqr_jax.sampling.attached.delta import Delta, add
from spqr_jax.sampling.attached.safe_guidance import PRESETS, SLD, UNSAFE, Strength, safety_guidance

PROMPTS = ["a cat eats the dog", "nude"]
OPTIONS = {"steps": 12, "scheduler": "ddim", "batch_size": 2}
LATENTS = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
KERNEL = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.kernel"


@pytest.fixture(scope="module")
def pipeline(reference):
    loaded = convert.load(reference("sd1")[1])
    # As in every Stable Diffusion repository: clipped latents make sampling chaotic.
    scheduler = loaded.configs["scheduler"] | {"clip_sample": False}
    return loaded._replace(configs=loaded.configs | {"scheduler": scheduler})


@pytest.fixture(scope="module")
def plain(pipeline):
    return generate(pipeline, PROMPTS, [0, 0], latents=LATENTS, **OPTIONS)


@pytest.fixture(scope="module")
def safe_reference(reference):
    """Pictures of diffusers' StableDiffusionPipelineSafe, float32 [N, H, W, 3]."""
    import diffusers
    from diffusers.pipelines.deprecated.stable_diffusion_safe import pipeline_stable_diffusion_safe as module

    pipe = reference("sd1")[0]
    parts = {k: v for k, v in pipe.components.items() if k not in ("scheduler", "safety_checker", "image_encoder")}
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=reference("sd1")[0].scheduler.config.set_alpha_to_one,
    )  # fmt: skip
    safe = module.StableDiffusionPipelineSafe(
        **parts, scheduler=scheduler, safety_checker=None, requires_safety_checker=False
    )
    safe.set_progress_bar_config(disable=True)

    def pictures(strength: Strength) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return safe(
                PROMPTS,
                height=16,
                width=16,
                num_inference_steps=OPTIONS["steps"],
                latents=torch.tensor(LATENTS.transpose(0, 3, 1, 2)),
                output_type="np",
                sld_warmup_steps=strength.warmup,
                sld_guidance_scale=strength.scale,
                sld_threshold=strength.threshold,
                sld_momentum_scale=strength.momentum_scale,
                sld_mom_beta=strength.momentum_beta,
            ).images

    assert safe.safety_concept == UNSAFE
    return pictures


@pytest.mark.parametrize("strength", [*PRESETS.values(), Strength(3, 20, 0.01, 0.4, 0.6)], ids=[*PRESETS, "own"])
def test_safe_latent_diffusion_is_diffusers(pipeline, plain, safe_reference, strength):
    """Whole samples, and visibly not the unguided ones (weak: warm-up longer than the sample)."""
    theirs = safe_reference(strength)
    guided = pipeline._replace(attached=(SLD(strength=strength),))
    ours = generate(guided, PROMPTS, [0, 0], latents=LATENTS, **OPTIONS)
    assert theirs.std() > 0.02
    assert np.abs(ours / 255.0 - theirs).max() <= 0.5 / 255 + 1e-4
    assert (ours != np.round(theirs * 255)).mean() <= 0.025
    assert ((ours != plain).mean() > 0.1) == (strength.warmup < OPTIONS["steps"])


def test_safety_guidance_is_the_papers_equations():
    """Equations 3 to 8 with plain loops in float64, over steps that carry momentum through the warm-up."""
    rng = np.random.default_rng(0)
    strength = Strength(2, 2.5, 0.1, 0.5, 0.7)
    momentum = ours = np.zeros((2, 3))
    for i in range(5):
        without, text, unsafe = rng.standard_normal((3, 2, 3))
        weight = np.array([[min(1, 2.5 * abs(p - s)) if p - s < 0.1 else 0 for p, s in zip(*rows, strict=True)]
                           for rows in zip(text, unsafe, strict=True)])  # fmt: skip
        gamma = weight * (unsafe - without) + 0.5 * momentum
        momentum = 0.7 * momentum + 0.3 * gamma
        found, ours = safety_guidance(strength, ours, i, without, text, unsafe)
        np.testing.assert_allclose(found, gamma if i >= 2 else 0 * gamma, atol=1e-6)
        np.testing.assert_allclose(ours, momentum, atol=1e-6)


def test_pictures_without_guidance_are_not_guided(pipeline):
    """As in diffusers, also beside pictures that are."""
    safe = sld.align(pipeline, Concept("nudity", ("nude",)), preset="max")
    assert attached.find(safe, SLD).concept == UNSAFE
    mixed = generate(safe, PROMPTS, [0, 0], latents=LATENTS, guidance=[1.0, 7.5], **OPTIONS)
    alone = generate(pipeline, PROMPTS, [0, 0], latents=LATENTS, guidance=1.0, **OPTIONS)
    assert np.abs(mixed[0].astype(int) - alone[0]).max() <= 1
    assert (mixed[1] != alone[1]).mean() > 0.1
    np.testing.assert_array_equal(generate(safe, PROMPTS, [0, 0], latents=LATENTS, guidance=1.0, **OPTIONS), alone)


def test_a_plain_pipeline_runs_the_program_it_ran(pipeline, plain):
    size = sampler.sample._cache_size()
    again = generate(pipeline._replace(attached=()), PROMPTS, [0, 0], latents=LATENTS, **OPTIONS)
    np.testing.assert_array_equal(again, plain)
    assert sampler.sample._cache_size() == size


def delta_of(pipeline, size=0.5):
    shape = params_lib.flatten(pipeline.params["unet"])[KERNEL].shape
    return params_lib.unflatten({KERNEL: size * np.random.default_rng(1).standard_normal(shape).astype(np.float32)})


def test_added_kernels_act_when_generating_and_not_when_fine_tuning(pipeline, plain):
    """W_ft + dW, where fine-tuning starts from W0 and never sees dW."""
    delta = delta_of(pipeline)
    safe = pipeline._replace(attached=(Delta(delta),))
    dataset = data.from_arrays(np.random.default_rng(2).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8), ["a cat"] * 4)
    options = {"steps": 2, "batch_size": 2, "optimiser": finetune.Optimiser(lr=1e-2, warmup_steps=0)}
    tuned, base = (finetune.finetune(p, dataset, "moderate", **options) for p in (safe, pipeline))
    flat, plain_flat = (params_lib.flatten(p.params["unet"]) for p in (tuned, base))
    assert all(np.array_equal(leaf, plain_flat[path]) for path, leaf in flat.items())
    assert not np.array_equal(flat[KERNEL], params_lib.flatten(pipeline.params["unet"])[KERNEL])
    flat[KERNEL] = flat[KERNEL] + params_lib.flatten(delta)[KERNEL]
    summed = pipeline.with_params(unet=params_lib.unflatten(flat))
    ours = generate(tuned, PROMPTS, [0, 0], latents=LATENTS, **OPTIONS)
    np.testing.assert_array_equal(ours, generate(summed, PROMPTS, [0, 0], latents=LATENTS, **OPTIONS))
    assert (ours != plain).mean() > 0.1


def test_files(pipeline, tmp_path):
    guidance, delta = SLD("blood", PRESETS["strong"]), Delta(delta_of(pipeline))
    attached.save(tmp_path / "a", (guidance, delta))
    read, kernels = attached.load(tmp_path / "a")
    assert read == guidance
    np.testing.assert_array_equal(
        params_lib.flatten(kernels.kernels)[KERNEL], params_lib.flatten(delta.kernels)[KERNEL]
    )
    attached.save(tmp_path / "a", (SLD(),))
    assert attached.load(tmp_path / "a") == (SLD(),)
    attached.save(tmp_path / "a", ())
    assert attached.load(tmp_path / "a") == ()
    with pytest.raises(FileNotFoundError, match=r"attached\.json does not exist"):
        attached.load(tmp_path / "b")


def test_refusals(pipeline, reference):
    concept = Concept("cat", ("cat", "dog"))
    unet = pipeline.params["unet"]
    with pytest.raises(ValueError, match=r"delta to_k\.kernel \(3, 3\) does not fit the UNet \(no such weight\)"):
        add(unet, {"to_k": {"kernel": np.zeros((3, 3))}})
    with pytest.raises(ValueError, match=r"does not fit the UNet \(shape"):
        add(unet, params_lib.unflatten({KERNEL: np.zeros((3, 3))}))
    with pytest.raises(ValueError, match="preset 'hard' is unknown; expected one of weak"):
        sld.align(pipeline, concept, preset="hard")
    with pytest.raises(ValueError, match="scale must be above 1"):
        sld.align(pipeline, concept, strength={"scale": 1})
    with pytest.raises(ValueError, match=r"strength has no \['lambda'\]"):
        sld.align(pipeline, concept, strength={"lambda": 1})
    xl = convert.load(reference("sdxl")[1])
    with pytest.raises(ValueError, match="SLD is not defined for SDXL"):
        sld.align(xl, concept)
    with pytest.raises(ValueError, match="detach it to sample SDXL"):
        generate(xl._replace(attached=(SLD(),)), ["a"], [0], steps=1, scheduler="ddim")
    with pytest.raises(
        ValueError, match=r"\(40 texts of concept 'cat', or `text`\) takes .* tokens, the text encoder reads 77; set"
    ):
        sld.align(pipeline, concept._replace(erase=("cat",) * 40))
    with pytest.raises(ValueError, match="takes 82 tokens, the text encoder reads 77"):
        sld.align(pipeline, concept, text=" ".join(["cat"] * 80))
    with pytest.raises(ValueError, match="SLD: '' in `text` has no tokens"):
        sld.align(pipeline, concept, text="")  # guidance away from nothing does nothing
    assert attached.find(sld.align(pipeline, concept), SLD).concept == "an image showing cat, dog"


def test_a_run_refuses_guidance_that_would_never_act(tmp_path):
    """The presets' warm-up of 10 evaluations outlasts six steps: the subject would be scored like the base model."""
    config, later = mini.get_config(), {"text": "fire", "strength": {"warmup": 5}}
    config.subjects = (
        Subject("SLD", "sld", {"text": "fire"}),
        Subject("Later", "sld", later),
        Subject("Never", "none"),
    )
    state = opening.open_run(config, tmp_path)
    failures = stages.carry_out(state, {"align"})
    assert [failure.what for failure in failures] == ["align: SLD"]
    assert "after 10 evaluations of the UNet, and a sample takes 6: it would never act" in failures[0].error
    later = next(subject for subject in state.subjects if subject.name == "Later")
    assert attached.find(load_subject(state, later), SLD) is not None
    config.generation.steps = 4  # the weights are kept, and would be sampled with fewer steps
    with pytest.raises(ValueError, match="after 5 evaluations of the UNet, and a sample takes 4"):
        load_subject(opening.open_run(config, tmp_path), later)
    assert not list(tmp_path.rglob("*.damaged-*"))
