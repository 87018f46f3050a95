"""Fine-tuning against PyTorch: diffusers' UNet, PEFT's LoRA, torch.optim.AdamW, gradient clipping, LambdaLR warm-up.

The reference shares no arithmetic with ours: its VAE, text encoder, scheduler and optimiser are diffusers',
transformers' and PyTorch's. Only what is random comes from our side (`Noising.draw`, the adapters' first weights).
"""

import copy
import json
import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import convert
from spqr_jax import data, finetune, profiles, schedulers
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition, Denoiser, Drawn
from spqr_jax.backbones.noising import DDPM
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.params import Definition
from spqr_jax.params import flatten as flat
from spqr_jax.training import step
from spqr_jax.training.objective import Objective, denoising_loss

jax.config.update("jax_default_matmul_precision", "highest")
STEPS, BATCH, SEED, RANK, ALPHA = 10, 2, 42, 4, 8.0
# A short warm-up, a rate that moves the loss within ten steps, and a norm that clips some steps and not others.
OPTIMISERS = {
    profile: finetune.Optimiser(lr=2e-3, warmup_steps=4, max_grad_norm=norm)
    for profile, norm in {"dora": 0.065, "lite": 0.065, "moderate": 0.155, "standard": 1.4}.items()
}
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
    if hasattr(pipe, "text_encoder_2"):
        context, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(len(captions), 1)
        return {"encoder_hidden_states": context, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    ids = pipe.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return {"encoder_hidden_states": pipe.text_encoder(ids.input_ids)[0]}


def torch_trainable(pipeline, pipe, profile: str, adapters: dict) -> list:
    """Freeze a pipeline but for the profile, in PyTorch's own terms; the parameters to train."""
    for module in components(pipe).values():
        module.requires_grad_(False)
    pipe.unet.requires_grad_(profile == "standard")
    if profile == "moderate":
        for name, module in pipe.unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_out")):
                module.requires_grad_(True)
    if profile in profiles.WITH_ADAPTERS:
        add_adapters(pipeline, pipe, profile, adapters)
    return [p for module in components(pipe).values() for p in module.parameters() if p.requires_grad]


def components(pipe) -> dict:
    """The UNet and the text encoders."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def add_adapters(pipeline, pipe, profile: str, adapters: dict) -> None:
    """PEFT's adapters, with our A and B at first, as diffusers' train_text_to_image_lora_sdxl.py adds them."""
    options = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "seed": SEED} | adapters
    _, trainable, _, _ = finetune.prepare(pipeline, profile, **options)
    ours = {re.sub(r"\.lora\.(lora_.)\.kernel", r".\1.default.weight", p): x for p, x in flat(trainable).items()}
    ours = {re.sub(r"\.lora\.magnitude", ".lora_magnitude_vector.default.weight", p): x for p, x in ours.items()}
    for component, module in components(pipe).items():
        prefix, targets = "", ["to_q", "to_k", "to_v", "to_out.0"]
        if component != "unet":
            if not adapters.get("text_encoder") and profile != "lora_text":
                continue
            # transformers 5 keeps "text_model." only in the class with a projection.
            flattened = not hasattr(module, "text_model")
            prefix = f"{component}.text_model." if flattened else f"{component}."
            targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        config = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "use_dora": profile == "dora"}
        module.add_adapter(peft.LoraConfig(**config, target_modules=targets))
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                start = torch.tensor(np.asarray(ours.pop(prefix + name)).T.copy())
                if "magnitude" in name:  # both start as the norms of the same weights
                    torch.testing.assert_close(start, parameter.data, rtol=1e-6, atol=0)
                parameter.data = start
    assert not ours, "we train adapters that PEFT does not"


def torch_run(
    *arguments, loss_of=torch.nn.functional.mse_loss, trainable=torch_trainable, after_step=lambda pipe: None
):
    """(pipeline after as many steps as `order` has batches, losses, gradient norms, learning rates).

    arguments: pipe, pipeline, dataset, optimiser, profile, prediction type, order, adapters.
    """
    pipe, pipeline, dataset, o, profile, prediction_type, order, adapters = arguments
    pipe = copy.deepcopy(pipe)
    pipe.unet.train()  # dropout is off: the models have none, the adapters' is 0
    trainable = trainable(pipeline, pipe, profile, adapters)
    config = json.loads(pipe.scheduler.to_json_string()) | {"prediction_type": prediction_type}
    ddpm = diffusers.DDPMScheduler.from_config(config)
    images = torch.tensor(dataset.images(np.arange(len(dataset)))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    scale = pipe.vae.config.scaling_factor
    mean, std = ((scale * x).permute(0, 2, 3, 1).numpy() for x in (posterior.mean, posterior.std))
    size = max(len(rows) for rows in order)

    def losses():
        for i, rows in enumerate(order):
            key = jax.random.fold_in(jax.random.key(SEED), i)
            schedule = np.zeros(ddpm.config.num_train_timesteps)
            filled = np.resize(rows, size)  # a short batch draws as a full one does
            drawn = DDPM.draw(key, mean[filled], std[filled], schedule)
            latents, noise, t = (torch.tensor(np.asarray(x))[: len(rows)] for x in drawn)
            latents, noise = latents.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
            conditions = torch_conditions(pipe, [dataset.captions[row] for row in rows])
            output = pipe.unet(ddpm.add_noise(latents, noise, t), t, **conditions).sample
            target = noise if prediction_type == "epsilon" else ddpm.get_velocity(latents, noise, t)
            yield loss_of(output, target)

    return pipe, *descend(trainable, o, losses(), after_step=lambda: after_step(pipe))


def descend(trainable: list, o, losses, after_step=lambda: None) -> tuple[list[float], list[float], list[float]]:
    """(losses, gradient norms, learning rates) of a step for every loss, each computed when the step before is done."""
    optimiser = torch.optim.AdamW(trainable, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, step / o.warmup_steps))
    found, norms, rates = [], [], []
    for loss in losses:
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, o.max_grad_norm)))
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        warmup.step()
        after_step()
        optimiser.zero_grad()
        found.append(float(loss.detach()))
    return found, norms, rates


def torch_weights(model) -> dict[str, np.ndarray]:
    """The model's own names, adapters folded in by PEFT."""
    for module in model.modules():
        if getattr(module, "lora_magnitude_vector", None):
            module.merge()  # a product, not a sum
    weights = {
        name.replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and not module.merged:
            weights[f"{name}.weight"] += module.get_delta_weight("default").detach()
    return {key: value.numpy() for key, value in weights.items()}


def our_run(pipeline, dataset, profile: str, **options):
    """(fine-tuned pipeline, progress of every step)."""
    progress = []
    defaults = {
        "optimiser": OPTIMISERS.get(profile, finetune.Optimiser()),
        "steps": STEPS,
        "batch_size": BATCH,
        "rank": RANK,
        "alpha": ALPHA,
    }
    options = defaults | {"seed": SEED, "dropout": 0.0, "on_step": progress.append} | options
    return finetune.finetune(pipeline, dataset, profile, **options), progress


def check_against_torch(
    reference, dataset, kind: str, profile: str, prediction_type: str, rows=None, clip=None, adapters=None, **options
):
    """rows: those of every step that `options` lead to (default: of all in shuffled order)."""
    pipe, directory = reference(kind)
    pipeline = with_prediction(convert.load(directory), prediction_type)
    rows, adapters, o = rows or shuffled(dataset), adapters or {}, OPTIMISERS[profile]
    o = o._replace(max_grad_norm=clip or o.max_grad_norm)
    trained, losses, norms, rates = torch_run(pipe, pipeline, dataset, o, profile, prediction_type, rows, adapters)
    tuned, progress = our_run(pipeline, dataset, profile, optimiser=o, **adapters, **options)

    np.testing.assert_allclose([p.loss for p in progress], losses, rtol=1e-5)
    np.testing.assert_allclose([p.grad_norm for p in progress], norms, rtol=1e-3)
    np.testing.assert_allclose([p.lr for p in progress], rates, rtol=1e-6)
    assert [p.step for p in progress] == list(range(1, len(rows) + 1))
    assert min(norms[1:]) < o.max_grad_norm < max(norms[1:]), "the clip must be seen at work, and not always"
    with_text = adapters.get("text_encoder", False) or profile == "lora_text"
    check_frozen(pipeline, tuned, profile, with_text)
    check_updates("unet", pipeline, tuned, trained.unet)
    if with_text:
        for name in set(components(trained)) - {"unet"}:
            check_updates(name, pipeline, tuned, getattr(trained, name))


def shuffled(dataset) -> list[np.ndarray]:
    return list(data.sample_order([len(dataset)], BATCH, STEPS, SEED))


def check_updates(component: str, pipeline, tuned, model) -> None:
    """The weights of a component have moved as PyTorch's have."""
    start, ours = (convert.rename.into_torch(p.params[component]) for p in (pipeline, tuned))
    theirs = torch_weights(model) | {name: buffer.numpy() for name, buffer in model.named_buffers() if name in ours}
    if not ours.keys() & theirs.keys():  # transformers 5 has no "text_model."
        theirs = {f"text_model.{key}": value for key, value in theirs.items()}
    assert ours.keys() == theirs.keys()
    moved = np.sqrt(sum(np.square(theirs[key] - start[key], dtype=np.float64).sum() for key in theirs))
    apart = np.sqrt(sum(np.square(theirs[key] - ours[key], dtype=np.float64).sum() for key in theirs))
    # AdamW divides by |gradient|: an entry whose gradient is rounding noise moves by the rate, in a direction that is
    # noise too. So what must agree is the update as a whole, not every entry of it.
    assert moved > 0 and apart <= 1e-4 * moved


def check_frozen(pipeline, tuned, profile: str, text_encoder: bool) -> None:
    """Exactly the profile's leaves have changed, the others not by a bit; no other component has."""
    flags = params_lib.flatten(profiles.mask(pipeline.params["unet"], profile))
    before, after = (flat(p.params["unet"]) for p in (pipeline, tuned))
    assert list(before) == list(after)
    assert changed(before, after) == {path for path, flag in flags.items() if flag}
    for name in set(pipeline.params) - {"unet"}:
        if text_encoder and name != "vae":
            before, after = (flat(p.params[name]) for p in (pipeline, tuned))
            assert list(before) == list(after)
            expected = {p for p in before if re.search(r"\.(q|k|v|out)_proj\.kernel$", p)}
            if name == "text_encoder" and "text_encoder_2" in pipeline.params:  # SDXL reads its penultimate states
                last = pipeline.configs[name]["num_hidden_layers"] - 1
                expected = {p for p in expected if f".layers.{last}." not in p}
            assert changed(before, after) == expected
        else:
            assert tuned.params[name] is pipeline.params[name]


def changed(before, after) -> set[str]:
    return {path for path in before if not np.array_equal(before[path], after[path])}


# One whole comparison runs always; the rest of the grid with `-m slow`, since each compiles a program of its own.
CASES = [(profile, prediction) for profile in profiles.PROFILES for prediction in ("epsilon", "v_prediction")]
CASES = [case if case == ("standard", "epsilon") else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("profile", "prediction_type"), CASES)
def test_ten_steps(reference, dataset, profile, prediction_type):
    check_against_torch(reference, dataset, "sd1", profile, prediction_type)


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_curriculum_of_increments_with_short_batches(reference, dataset, parts):
    """Rows 0 to 2 three times in batches of 2 and 1, then rows 3 to 5. PyTorch's batches are really short."""
    rows = [[0, 1], [2]] * 3 + [[3, 4], [5]] * 3
    options = {"curriculum": (3, 6), "stages": "increments", "order": "file", "steps": None, "epochs": 3}
    options["memory"] = finetune.Memory(accumulate=parts)
    check_against_torch(reference, dataset, "sd1", "moderate", "epsilon", rows, **options)


@pytest.mark.parametrize(("kind", "clip"), [("sd1", 0.35), pytest.param("sdxl", 0.35, marks=pytest.mark.slow)])
def test_lite_with_the_text_encoder(reference, dataset, kind, clip):
    """PEFT's adapters in diffusers' UNet and in transformers' text encoders, Gaussian at first."""
    adapters = {"text_encoder": True, "lora_init": "gaussian"}
    check_against_torch(reference, dataset, kind, "lite", "epsilon", adapters=adapters, clip=clip)


@pytest.mark.parametrize(("kind", "clip"), [("sd1", 0.065), pytest.param("sdxl", 0.085, marks=pytest.mark.slow)])
def test_dora(reference, dataset, kind, clip):
    """PEFT with use_dora: losses of ten steps, and the weights with adapters and magnitudes merged."""
    check_against_torch(reference, dataset, kind, "dora", "epsilon", clip=clip)


@pytest.mark.slow
def test_ten_steps_of_sdxl(reference, dataset):
    """With pooled text and time ids in the loss."""
    check_against_torch(reference, dataset, "sdxl", "moderate", "epsilon")


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_no_steps_no_change(pipeline, dataset, profile):
    """Adapters start at zero and merging them changes no bit."""
    tuned, progress = our_run(pipeline, dataset, profile, steps=0)
    before, after = (params_lib.flatten(p.params["unet"]) for p in (pipeline, tuned))
    assert not progress and all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_frozen_leaves_have_no_optimiser_state(pipeline, profile):
    """Two moments for each trained number, and nothing else but counters."""
    _, trainable, frozen, _ = finetune.prepare(pipeline, profile, rank=RANK, alpha=ALPHA, dropout=0.1, seed=SEED)
    base = params_lib.count(pipeline.params["unet"])
    adapters = params_lib.count(trainable) if profile == "lite" else 0
    assert params_lib.count(trainable) + params_lib.count(frozen) == base + adapters
    state = jax.eval_shape(lambda t: step.init_state(t, OPTIMISERS[profile]), trainable)
    stored = [leaf for leaf in jax.tree.leaves(state["opt"]) if leaf.shape]
    assert sum(leaf.size for leaf in stored) == 2 * params_lib.count(trainable)


@pytest.mark.slow
def test_the_first_step_of_a_warm_up_moves_nothing(pipeline, dataset):
    """As with diffusers' constant_with_warmup: the rate starts at zero."""
    tuned, (only,) = our_run(pipeline, dataset, "moderate", steps=1)
    before, after = (params_lib.flatten(p.params["unet"]) for p in (pipeline, tuned))
    assert only.lr == 0 and only.loss > 0 and all(np.array_equal(before[path], after[path]) for path in before)


def test_defaults_are_the_papers():
    """Table B."""
    assert finetune.Optimiser() == (1e-4, 500, 0.9, 0.999, 1e-8, 1e-2, 1.0)
    assert Objective() == (None, 0.0, 0.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighting(prediction_type):
    """As in diffusers' train_text_to_image.py with --snr_gamma 5."""
    from diffusers.training_utils import compute_snr

    ddpm = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    rng = np.random.default_rng(0)
    latents, noise, output = rng.standard_normal((3, 6, 4, 4, 4)).astype(np.float32)
    t = np.array([0, 100, 300, 500, 800, 999])
    snr = compute_snr(ddpm, torch.tensor(t))
    weight = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction_type == "epsilon" else snr + 1)
    theirs = [torch.tensor(x) for x in (latents, noise)]
    target = theirs[1] if prediction_type == "epsilon" else ddpm.get_velocity(*theirs, torch.tensor(t))
    expected = (((torch.tensor(output) - target) ** 2).mean((1, 2, 3)) * weight).mean()
    alphas = schedulers.ddpm.alphas_cumprod(dict(ddpm.config))
    drawn, condition = Drawn(latents, noise, t), Condition(np.zeros((len(t), 1, 1)))
    denoiser = Denoiser(STABLE_DIFFUSION, Definition(None), prediction_type)
    loss = denoising_loss(denoiser, lambda *_: jax.numpy.asarray(output), condition, drawn, alphas, 5.0)
    np.testing.assert_allclose(float(loss), float(expected), rtol=1e-5)


def test_what_a_step_draws():
    mean, std = np.full((4096, 2, 2, 4), 3, np.float32), np.full((4096, 2, 2, 4), 0.5, np.float32)
    latents, noise, t = (np.asarray(x) for x in DDPM.draw(jax.random.key(0), mean, std, np.zeros(100)))
    assert latents.mean() == pytest.approx(3, abs=0.01) and latents.std() == pytest.approx(0.5, abs=0.01)
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
    assert set(t) == set(range(100)) and np.bincount(t).std() == pytest.approx(np.sqrt(4096 / 100), rel=0.5)
    assert abs(np.corrcoef(((latents - 3) / 0.5).ravel(), noise.ravel())[0, 1]) < 0.02
    again = DDPM.draw(jax.random.key(0), mean, std, np.zeros(100))
    other = DDPM.draw(jax.random.key(1), mean, std, np.zeros(100))
    assert np.array_equal(again[1], noise) and not np.array_equal(other[1], noise)


def test_noise_offset_is_common_to_a_channels_pixels():
    mean = np.zeros((512, 4, 4, 4), np.float32)
    plain, offset = (np.asarray(DDPM.draw(jax.random.key(0), mean, mean, np.zeros(1000), x)[1]) for x in (0.0, 0.1))
    added = offset - plain
    assert np.ptp(added, axis=(1, 2)).max() < 1e-6 and added[:, 0, 0].std() == pytest.approx(0.1, rel=0.05)


@pytest.mark.slow
def test_ema_follows_the_weights(pipeline, dataset):
    """The average of every step's weights, starting from the first: e <- 0.5 e + 0.5 w."""
    optimiser, objective = OPTIMISERS["moderate"]._replace(warmup_steps=0), Objective(ema=0.5)
    options = {"optimiser": optimiser, "objective": objective}
    runs = [our_run(pipeline, dataset, "moderate", steps=n, **options)[0] for n in (1, 2)]
    plain = [our_run(pipeline, dataset, "moderate", steps=n, optimiser=optimiser)[0].params["unet"] for n in (1, 2)]
    leaf = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.kernel"
    w0, w1, w2 = (np.float64(params_lib.flatten(p)[leaf]) for p in (pipeline.params["unet"], *plain))
    ema1, ema2 = (params_lib.flatten(run.params["unet"])[leaf] for run in runs)
    np.testing.assert_allclose(ema1, (w0 + w1) / 2, atol=1e-7)
    np.testing.assert_allclose(ema2, (w0 + w1) / 4 + w2 / 2, atol=1e-7)
    assert np.abs(w1 - w0).max() > 1e-4


@pytest.mark.parametrize("watched", [True, False])
def test_a_loss_that_is_not_finite_stops_with_step_and_samples(pipeline, dataset, watched):
    def spoil(path, leaf):
        return np.full_like(leaf, np.nan) if path == "conv_out.bias" else leaf

    broken = pipeline.with_params(unet=params_lib.map_with_path(spoil, pipeline.params["unet"]))
    first = next(data.sample_order([len(dataset)], BATCH, STEPS, SEED)).tolist()
    seen = []
    with pytest.raises(FloatingPointError, match=r"loss nan, .* at step 1 \(samples") as caught:
        our_run(broken, dataset, "moderate", on_step=seen.append if watched else None)
    assert str(first) in str(caught.value) and not seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "full"}, "profile 'full' is unknown"),
        ({"curriculum": (2, 7)}, "asks for 7 samples, the data set has 6"),
        ({"curriculum": (4, 2)}, "curriculum must be increasing"),
        ({"stages": "cumulative"}, "stages 'cumulative' is unknown; expected one of nested, increments"),
        ({"order": "random"}, "order 'random' is unknown; expected one of shuffled, file"),
        ({"text_encoder": True}, "text_encoder adapts .* under the profile \"lite\" only, found 'moderate': the paper"),
        ({"profile": "lite", "lora_init": "olora"}, "lora_init 'olora' is unknown; expected one of kaiming, gaussian"),
        ({"batch_size": 0}, "batch_size 0 is not a positive multiple"),
        ({"steps": -1}, "steps must not be negative, found -1"),
        ({"steps": None, "epochs": -2}, "epochs must not be negative, found -2"),
        ({"profile": "lite", "rank": 33}, "rank 33 does not fit"),
    ],
)
def test_arguments_are_refused_before_any_work(pipeline, dataset, options, message, monkeypatch):
    monkeypatch.setattr(finetune.latents, "encode", lambda *_, **__: pytest.fail("the data were encoded first"))
    with pytest.raises(ValueError, match=message):
        our_run(pipeline, dataset, **{"profile": "moderate"} | options)


@pytest.mark.parametrize("count", [0, 2])
def test_data_that_do_not_fit(pipeline, count):
    odd = data.from_arrays(np.zeros((count, 15, 16, 3), np.uint8), ["a"] * count, "odd")
    with pytest.raises(ValueError, match="odd: images are 15x16" if count else "empty"):
        our_run(pipeline, odd, "moderate")


def test_steps_default_to_the_profiles_epochs_over_all_stages():
    """Six samples in stages of 2 and 6, batches of 4: 1 + 2 batches an epoch."""
    assert finetune.num_steps("lite", [2, 6], 4, None, None) == 3
    assert finetune.num_steps("moderate", [2, 6], 4, None, None) == 9
    assert finetune.num_steps("standard", [2, 6], 4, None, 2) == 6
    assert finetune.num_steps("standard", [2, 6], 4, 5, None) == 5
    assert finetune.num_steps("moderate", [5, 12], 4, None, None) == 3 * (2 + 3)
    assert finetune.num_steps("moderate", [5, 12], 4, None, None, stages="increments") == 3 * (2 + 2)
