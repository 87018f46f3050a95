"""Fine-tuning against PyTorch: diffusers' UNet, PEFT's LoRA, torch.optim.AdamW, gradient clipping, LambdaLR warm-up.

The reference shares no arithmetic with ours: its VAE, text encoder, scheduler and optimiser are diffusers',
transformers' and PyTorch's. Only what is random comes from our side (`finetune.draw`, the adapters' first weights).
"""

import copy
import functools
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import convert
from spqr_jax import data, finetune, profiles, schedulers
from spqr_jax import params as params_lib

jax.config.update("jax_default_matmul_precision", "highest")
STEPS, BATCH, SEED, RANK, ALPHA = 10, 2, 42, 4, 8.0
# A short warm-up and a rate that moves the loss within ten steps; the norm is clipped at some steps and not at others.
OPTIMISER = finetune.Optimiser(lr=2e-3, warmup_steps=4, max_grad_norm=0.5)
CAPTIONS = ["a cat", "the dog", "a cat eats", "do", "dog and cat", ""]


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), np.uint8)
    return data.from_arrays(images, CAPTIONS)


def with_prediction(pipeline, prediction_type: str):
    scheduler = pipeline.configs["scheduler"] | {"prediction_type": prediction_type}
    return pipeline._replace(configs=pipeline.configs | {"scheduler": scheduler})


def torch_conditions(pipe, captions: list[str]) -> dict:
    """Text states as the pipeline's own encode_prompt gives them; SDXL's added conditions too."""
    with torch.no_grad():
        if hasattr(pipe, "text_encoder_2"):
            context, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
            ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(captions), 1)
            return {"encoder_hidden_states": context, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        ids = pipe.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return {"encoder_hidden_states": pipe.text_encoder(ids.input_ids)[0]}


def take(tree, rows):
    return {k: take(v, rows) for k, v in tree.items()} if isinstance(tree, dict) else tree[rows]


def torch_trainable(pipeline, unet, profile: str) -> list:
    """Freeze the UNet but for the profile, in PyTorch's own terms; the parameters to train."""
    unet.requires_grad_(profile == "standard")
    if profile == "moderate":
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out")):
                module.requires_grad_(True)
    if profile == "lite":
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))
        _, ours, _, _ = finetune.prepare(pipeline, "lite", rank=RANK, alpha=ALPHA, dropout=0.0, seed=SEED)
        adapters = {p.replace(".kernel", ".default.weight"): leaf for p, leaf in params_lib.flatten(ours).items()}
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.tensor(np.asarray(adapters.pop(name.replace(".lora_", ".lora.lora_"))).T.copy())
        assert not adapters, "we train adapters that PEFT does not"
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def torch_run(pipe, pipeline, dataset, profile: str, prediction_type: str, o=OPTIMISER):
    """(UNet after STEPS steps, losses, gradient norms, learning rates)."""
    unet = copy.deepcopy(pipe.unet).train()  # dropout is off: the models have none, the adapters' is 0
    trainable = torch_trainable(pipeline, unet, profile)
    optimiser = torch.optim.AdamW(trainable, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, step / o.warmup_steps))
    config = json.loads(pipe.scheduler.to_json_string()) | {"prediction_type": prediction_type}
    ddpm = diffusers.DDPMScheduler.from_config(config)
    images = torch.tensor(dataset.images(np.arange(len(dataset)))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    scale = pipe.vae.config.scaling_factor
    mean, std = ((scale * x).permute(0, 2, 3, 1).numpy() for x in (posterior.mean, posterior.std))
    conditions = torch_conditions(pipe, list(dataset.captions))
    losses, norms, rates = [], [], []
    for i, rows in enumerate(data.sample_order([len(dataset)], BATCH, STEPS, SEED)):
        key = jax.random.fold_in(jax.random.key(SEED), i)
        drawn = finetune.draw(key, mean[rows], std[rows], ddpm.config.num_train_timesteps)
        latents, noise, t = (torch.tensor(np.asarray(x)) for x in drawn)
        latents, noise = latents.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
        output = unet(ddpm.add_noise(latents, noise, t), t, **take(conditions, rows)).sample
        target = noise if prediction_type == "epsilon" else ddpm.get_velocity(latents, noise, t)
        loss = torch.nn.functional.mse_loss(output, target)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, o.max_grad_norm)))
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        warmup.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return unet, losses, norms, rates


def torch_weights(unet) -> dict[str, np.ndarray]:
    """The UNet's own names, adapters folded in by PEFT."""
    weights = {}
    for name, module in unet.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}".replace(".base_layer", "")
            if ".lora_" not in key:
                weights[key] = parameter.detach()
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] = module.base_layer.weight.detach() + module.get_delta_weight("default").detach()
    return {key: value.numpy() for key, value in weights.items()}


def our_run(pipeline, dataset, profile: str, **options):
    progress = []
    options = {"optimiser": OPTIMISER, "steps": STEPS, "batch_size": BATCH, "rank": RANK, "alpha": ALPHA} | options
    tuned = finetune.finetune(
        pipeline, dataset, profile, seed=SEED, dropout=0.0, on_step=progress.append, **options
    )
    return tuned, progress


def check_against_torch(reference, dataset, kind: str, profile: str, prediction_type: str) -> None:
    pipe, directory = reference(kind)
    pipeline = with_prediction(convert.load(directory), prediction_type)
    unet, losses, norms, rates = torch_run(pipe, pipeline, dataset, profile, prediction_type)
    tuned, progress = our_run(pipeline, dataset, profile)

    np.testing.assert_allclose([p.loss for p in progress], losses, rtol=1e-5)
    np.testing.assert_allclose([p.grad_norm for p in progress], norms, rtol=1e-3)
    np.testing.assert_allclose([p.lr for p in progress], rates, rtol=1e-6)
    assert [p.step for p in progress] == list(range(1, STEPS + 1))
    assert min(norms[1:]) < OPTIMISER.max_grad_norm < max(norms), "the clip must be seen at work, and not always"
    assert losses[-1] != losses[0]

    start, ours, theirs = (
        convert.rename.into_torch(pipeline.params["unet"]),
        convert.rename.into_torch(tuned.params["unet"]),
        torch_weights(unet),
    )
    assert ours.keys() == theirs.keys()
    moved, apart = 0.0, 0.0
    for key in theirs:
        moved += float(np.square(theirs[key].astype(np.float64) - start[key]).sum())
        apart += float(np.square(theirs[key].astype(np.float64) - ours[key]).sum())
    print(kind, profile, prediction_type, "update error", np.sqrt(apart / moved), np.abs(np.array([p.loss for p in progress]) / losses - 1).max(), norms)
    # AdamW divides by |gradient|, so entries whose gradient is rounding noise move by the rate in a direction that is
    # noise too; the update as a whole is what can agree.
    assert apart <= 1e-6 * moved


CASES = [(profile, prediction) for profile in profiles.PROFILES for prediction in ("epsilon", "v_prediction")]


@pytest.mark.parametrize(("profile", "prediction_type"), CASES)
def test_ten_steps(reference, dataset, profile, prediction_type):
    check_against_torch(reference, dataset, "sd1", profile, prediction_type)


def test_ten_steps_of_sdxl(reference, dataset):
    """With pooled text and time ids in the loss."""
    check_against_torch(reference, dataset, "sdxl", "moderate", "epsilon")
