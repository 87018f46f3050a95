"""Fine-tuning SD3 against PyTorch: diffusers' transformer, PEFT's LoRA, torch.optim.AdamW, ten steps of each profile.

The reference's VAE, text encoders, noise levels and optimiser are diffusers', transformers' and PyTorch's. What is
random comes from our side (`Noising.draw`, the adapters' first weights).
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
from spqr_jax import backbones, data, finetune, profiles
from spqr_jax.backbones.noising import SD3_FLOW
from spqr_jax.params import flatten
from tests import flow_reference
from tests.parity import test_finetune as unet

jax.config.update("jax_default_matmul_precision", "highest")
STEPS, BATCH, SEED, RANK, ALPHA = unet.STEPS, unet.BATCH, unet.SEED, unet.RANK, unet.ALPHA
LENGTH = 8  # tokens for T5
IMAGE = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
]
TEXT = ["attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"]
MODERATE = re.compile(r"\.attn\.(add_k_proj|add_v_proj|to_add_out)\.(weight|bias)$")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pipe, folder = flow_reference.sd3("sd35m"), tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    return pipe, convert.load(folder)._replace(text_length=LENGTH)


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(unet.CAPTIONS), 16, 16, 3), np.uint8)
    return data.from_arrays(images, unet.CAPTIONS)


def trainable_of(pipe, pipeline, profile: str, joint_text: bool) -> list:
    """Freeze the transformer but for the profile, in PyTorch's own terms; the parameters to train."""
    model = pipe.transformer
    model.requires_grad_(profile == "standard")
    if profile == "moderate":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(MODERATE.search(name)))
    if profile == "lite":
        targets = IMAGE + (TEXT if joint_text else [])
        model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))
        options = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "seed": SEED, "joint_text": joint_text}
        ours = flatten(finetune.prepare(pipeline, "lite", **options)[1])
        ours = {re.sub(r"\.lora\.(lora_.)\.kernel", r".\1.default.weight", p): x for p, x in ours.items()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.tensor(np.asarray(ours.pop(name)).T.copy())
        assert not ours, "we train adapters that PEFT does not"
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def torch_run(pipe, pipeline, dataset, o, profile: str, joint_text: bool):
    """(trained transformer, losses, gradient norms) of ten steps, as train_dreambooth_sd3.py computes a step."""
    encoders = {n: getattr(pipe, n) for n in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    images = torch.tensor(dataset.images(np.arange(len(dataset)))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = encoders["vae"].encode(images).latent_dist
        context, _, pooled, _ = pipe.encode_prompt(
            list(dataset.captions), None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    fields = encoders["vae"].config
    mean = ((posterior.mean - fields.shift_factor) * fields.scaling_factor).permute(0, 2, 3, 1).numpy()
    std = (posterior.std * fields.scaling_factor).permute(0, 2, 3, 1).numpy()
    pipe = copy.deepcopy(pipe)
    trainable = trainable_of(pipe, pipeline, profile, joint_text)
    optimiser = torch.optim.AdamW(trainable, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, step / o.warmup_steps))
    losses, norms = [], []
    for i, rows in enumerate(data.sample_order([len(dataset)], BATCH, STEPS, SEED)):
        key = jax.random.fold_in(jax.random.key(SEED), i)
        drawn = SD3_FLOW.draw(key, mean[rows], std[rows], scheduler.sigmas.numpy())
        latents, noise, times = (torch.tensor(np.asarray(x)) for x in drawn)
        latents, noise = latents.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
        indices = [int((scheduler.timesteps == t).nonzero()) for t in times]
        sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        output = pipe.transformer(
            noisy,
            timestep=scheduler.timesteps[indices],
            encoder_hidden_states=context[rows],
            pooled_projections=pooled[rows],
        ).sample
        loss = ((output - (noise - latents)) ** 2).reshape(len(rows), -1).mean(1).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, o.max_grad_norm)))
        optimiser.step()
        warmup.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return pipe.transformer, losses, norms


@pytest.mark.parametrize(
    ("profile", "joint_text"), [("lite", False), ("lite", True), ("moderate", False), ("standard", False)]
)
def test_ten_steps(saved, dataset, profile, joint_text):
    pipe, pipeline = saved
    o = finetune.Optimiser(
        lr=2e-3, warmup_steps=4, max_grad_norm={"lite": 0.3, "moderate": 0.3, "standard": 2.0}[profile]
    )
    trained, losses, norms = torch_run(pipe, pipeline, dataset, o, profile, joint_text)
    options = {"optimiser": o, "joint_text": joint_text}
    tuned, progress = unet.our_run(pipeline, dataset, profile, **options)
    np.testing.assert_allclose([p.loss for p in progress], losses, rtol=1e-5)
    np.testing.assert_allclose([p.grad_norm for p in progress], norms, rtol=1e-3)
    check_frozen(pipeline, tuned, profile, joint_text)
    start, ours = (convert.rename.into_torch(p.params["transformer"]) for p in (pipeline, tuned))
    theirs = unet.torch_weights(trained) | {"pos_embed.pos_embed": start["pos_embed.pos_embed"]}
    assert ours.keys() == theirs.keys()
    moved = np.sqrt(sum(np.square(theirs[key] - start[key], dtype=np.float64).sum() for key in theirs))
    apart = np.sqrt(sum(np.square(theirs[key] - ours[key], dtype=np.float64).sum() for key in theirs))
    assert moved > 0 and apart <= 1e-4 * moved


def check_frozen(pipeline, tuned, profile: str, joint_text: bool) -> None:
    """Only the profile's leaves have changed; the table of positions never does; no other component has changed."""
    before, after = (flatten(p.params["transformer"]) for p in (pipeline, tuned))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    flags = flatten(profiles.mask(pipeline.params["transformer"], profile))
    assert flags == {
        path.removeprefix("transformer."): flag
        for path, flag in flatten(profiles.mask(pipeline.params, profile)).items()
        if path.startswith("transformer.")
    }
    expected = {path for path, flag in flags.items() if flag}
    if joint_text:
        region = backbones.of(pipeline).regions.lora_text
        expected |= {path for path in before if region.search(path)}
    # The last block hands no text tokens on, so its queries of text tokens have no effect.
    last = "transformer_blocks.2.attn."
    idle = {path for path in before if re.search(rf"{re.escape(last)}(add_q_proj|norm_added_q)\.", path)}
    assert changed - idle == expected - idle and "pos_embed.pos_embed" not in changed
    for name in set(pipeline.params) - {"transformer"}:
        assert pipeline.params[name] is tuned.params[name]


def test_what_lite_and_the_text_stream_are_asked_of(saved, reference):
    _, pipeline = saved
    with pytest.raises(ValueError, match='joint_text adapts the text stream under the profile "lite" only'):
        finetune.prepare(pipeline, "moderate", rank=2, alpha=2.0, dropout=0.0, seed=0, joint_text=True)
    other = convert.load(reference("sd1")[1])
    with pytest.raises(ValueError, match=r"joint_text needs the region 'lora_text' .* Stable Diffusion 1\.x or 2\.x"):
        finetune.prepare(other, "lite", rank=2, alpha=2.0, dropout=0.0, seed=0, joint_text=True)
    with pytest.raises(ValueError, match=r"text_encoder: Stable Diffusion 3 or 3\.5 has no text encoders"):
        finetune.prepare(pipeline, "lite", rank=2, alpha=2.0, dropout=0.0, seed=0, text_encoder=True)
