"""Fine-tuning of FLUX against PyTorch, as diffusers' train_dreambooth_flux.py trains it: uniform times, the noise less
the latents as the target, dev told guidance 1; PEFT's LoRA, torch.optim.AdamW, clipping, warm-up.

Only what is random comes from our side (`Noising.draw`, the adapters' first weights).
"""

import copy
import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import convert
from spqr_jax import backbones, data, finetune
from spqr_jax.params import flatten as flat
from tests import flux_reference as flux
from tests.parity.compared import relative_error
from tests.parity.test_finetune import ALPHA, BATCH, RANK, SEED, STEPS, changed, our_run, shuffled, torch_weights

jax.config.update("jax_default_matmul_precision", "highest")
LENGTH = 12  # tokens of a text
CAPTIONS = ["a cat", "the dog", "a cat eat", "nude", "dog", ""]
# Norms that clip some steps and not others.
NORMS = {
    ("dev", "lite"): 0.045,
    ("dev", "moderate"): 0.1,
    ("dev", "standard"): 1.85,
    ("schnell", "lite"): 0.045,
    ("schnell", "moderate"): 0.075,
    ("schnell", "standard"): 1.55,
}
# What the profiles train, in PyTorch's names.
MODERATE = re.compile(r"^transformer_blocks\.\d+\.attn\.(add_k_proj|add_v_proj|to_add_out)\.")
LITE = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_STREAM = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 8, 12, 3), np.uint8)
    return data.from_arrays(images, CAPTIONS)


def optimiser_of(kind: str, profile: str) -> finetune.Optimiser:
    """A short warm-up, and a rate that moves the loss within ten steps."""
    return finetune.Optimiser(lr=2e-3, warmup_steps=4, max_grad_norm=NORMS[kind, profile])


def load(kind: str):
    return convert.load(flux.saved(kind)[1])._replace(text_length=LENGTH)


def torch_trainable(pipeline, model, profile: str, **options) -> list:
    """Freeze a transformer but for the profile; the parameters to train."""
    model.requires_grad_(profile == "standard")
    if profile == "moderate":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(MODERATE.search(name)))
    if profile == "lite":
        targets = LITE + (TEXT_STREAM if options.get("joint_text") else [])
        model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))
        _, ours, _, _ = finetune.prepare(pipeline, "lite", rank=RANK, alpha=ALPHA, dropout=0.0, seed=SEED, **options)
        named = {re.sub(r"\.lora\.(lora_.)\.kernel", r".\1.default.weight", p): x for p, x in flat(ours).items()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.tensor(np.asarray(named.pop(name)).T.copy())
        assert not named, "we train adapters that PEFT does not"
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def torch_latents(pipe, dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the shifted and scaled latents, [N, h, w, C] each."""
    images = torch.tensor(dataset.images(np.arange(len(dataset)))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    config = pipe.vae.config
    mean, std = (posterior.mean - config.shift_factor) * config.scaling_factor, posterior.std * config.scaling_factor
    return tuple(x.permute(0, 2, 3, 1).numpy() for x in (mean, std))


def torch_loss(pipe, drawn, captions: list[str]):
    """The script's loss of these latents, noise and times."""
    latents, noise, times = (torch.tensor(np.asarray(x)) for x in drawn)
    latents, noise = latents.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    steps = [int((scheduler.timesteps - t).abs().argmin()) for t in times]
    times, sigmas = scheduler.timesteps[steps], scheduler.sigmas[steps].reshape(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    with torch.no_grad():
        context, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=LENGTH)
    (batch, channels, height, width), guided = noisy.shape, pipe.transformer.config.guidance_embeds
    output = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
        timestep=times / 1000,
        guidance=torch.ones(batch) if guided else None,
        pooled_projections=pooled,
        encoder_hidden_states=context,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]
    output = pipe._unpack_latents(output, height * flux.FACTOR, width * flux.FACTOR, flux.FACTOR)
    return torch.mean(((output - (noise - latents)) ** 2).reshape(batch, -1), 1).mean()


def torch_run(pipeline, kind: str, dataset, profile: str, **options):
    """(the transformer after STEPS steps, losses, gradient norms)."""
    pipe, o = copy.deepcopy(flux.saved(kind)[0]), optimiser_of(kind, profile)
    trainable = torch_trainable(pipeline, pipe.transformer, profile, **options)
    optimiser = torch.optim.AdamW(trainable, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, step / o.warmup_steps))
    mean, std = torch_latents(pipe, dataset)
    schedule, noising = backbones.schedule(pipeline), backbones.of(pipeline).noising
    losses, norms = [], []
    for i, rows in enumerate(shuffled(dataset)):
        drawn = noising.draw(jax.random.fold_in(jax.random.key(SEED), i), mean[rows], std[rows], schedule)
        loss = torch_loss(pipe, drawn, [dataset.captions[row] for row in rows])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, o.max_grad_norm)))
        optimiser.step()
        warmup.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return pipe.transformer, losses, norms


def check(kind: str, dataset, profile: str, **options) -> None:
    pipeline, o = load(kind), optimiser_of(kind, profile)
    model, losses, norms = torch_run(pipeline, kind, dataset, profile, **options)
    tuned, progress = our_run(pipeline, dataset, profile, optimiser=o, **options)
    np.testing.assert_allclose([p.loss for p in progress], losses, rtol=1e-5)
    np.testing.assert_allclose([p.grad_norm for p in progress], norms, rtol=1e-3)
    assert len(losses) == STEPS and len(losses) * BATCH > len(dataset)
    assert min(norms[1:]) < o.max_grad_norm < max(norms[1:]), f"the clip must be seen at work, and not always: {norms}"
    before, after = (flat(p.params["transformer"]) for p in (pipeline, tuned))
    theirs = torch_weights(model)
    start, ours = (convert.rename.into_torch(p.params["transformer"]) for p in (pipeline, tuned))
    assert {convert.rename.torch_name(path) for path in changed(before, after)} == {
        key for key in theirs if not np.array_equal(theirs[key], start[key])
    }
    moved = np.sqrt(sum(np.square(theirs[key] - start[key], dtype=np.float64).sum() for key in theirs))
    apart = np.sqrt(sum(np.square(theirs[key] - ours[key], dtype=np.float64).sum() for key in theirs))
    assert moved > 0 and apart <= 1e-4 * moved
    assert all(tuned.params[name] is pipeline.params[name] for name in ("vae", "text_encoder", "text_encoder_2"))


# One comparison runs always; the rest with `-m slow`, since each compiles a program of its own.
CASES = list(NORMS)
CASES = [case if case == ("dev", "moderate") else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("kind", "profile"), CASES)
def test_ten_steps(dataset, kind, profile):
    check(kind, dataset, profile)


@pytest.mark.slow
def test_lite_with_the_text_stream(dataset):
    check("dev", dataset, "lite", joint_text=True)


def test_encoded_images_are_those_of_the_script(dataset):
    from spqr_jax.training import latents

    pipeline = load("dev")
    ours = latents.encode(pipeline, dataset).scaled(pipeline)
    assert max(map(relative_error, ours, torch_latents(flux.saved("dev")[0], dataset))) <= 1e-5
