"""Single-file CompVis checkpoints against diffusers' own conversion of the same file."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from convert import families, rename
from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def compvis_unet(state: dict, layers: int = 1) -> dict:
    """diffusers' UNet names -> CompVis names, written by hand from the layout of the original code."""

    def name(key: str) -> str:
        module, leaf = key.rsplit(".", 1)
        if module in TOP:
            return f"{TOP[module]}.{leaf}"
        parts = key.split(".")
        if parts[0] == "mid_block":
            position = {"resnets": 2 * int(parts[2]), "attentions": 1}[parts[1]]
            inner = ".".join(parts[3:])
            return f"middle_block.{position}.{resnet(inner) if parts[1] == 'resnets' else inner}"
        block, kind, index, inner = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
        start = block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{1 + start + layers}.0.op.{leaf}"
        if kind == "upsamplers":
            behind = any(k.startswith(f"up_blocks.{block}.attentions") for k in state)
            return f"output_blocks.{start + layers}.{2 if behind else 1}.conv.{leaf}"
        number = f"input_blocks.{1 + start + index}" if parts[0] == "down_blocks" else f"output_blocks.{start + index}"
        return f"{number}.0.{resnet(inner)}" if kind == "resnets" else f"{number}.1.{inner}"

    def resnet(inner: str) -> str:
        module, leaf = inner.split(".")
        return f"{RESNET[module]}.{leaf}"

    return {f"model.diffusion_model.{name(key)}": value for key, value in state.items()}


def compvis_vae(state: dict, blocks: int = 2) -> dict:
    def name(key: str) -> str:
        key = key.replace("down_blocks", "down").replace("downsamplers.0", "downsample")
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", key)
        key = key.replace("upsamplers.0", "upsample").replace("conv_norm_out", "norm_out")
        key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        key = key.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
        for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            key = key.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
        return key

    # Attention in the original VAE is made of 1x1 convolutions.
    return {
        f"first_stage_model.{name(key)}": value[..., None, None] if ".attentions." in key and value.ndim == 2 else value
        for key, value in state.items()
    }


def prefixed(state: dict) -> dict:
    """Transformers' keys with `text_model.`, whichever version wrote them."""
    return {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items() if "position_ids" not in k}


def open_clip(state: dict, prefix: str, extra_layer: bool) -> dict:
    """Transformers' names -> OpenCLIP's, query, key and value stacked; with the layer that SD2 leaves out."""
    tops = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    renamed, stacks = {}, {}
    for key, value in prefixed(state).items():
        if key in tops:
            renamed[tops[key]] = value
        elif key == "text_projection.weight":
            renamed["text_projection"] = np.ascontiguousarray(value.T)
        else:
            layer, inner = re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)", key).groups()
            stacked = re.match(r"self_attn\.([qkv])_proj\.(\w+)", inner)
            if stacked:
                stacks.setdefault(f"transformer.resblocks.{layer}.attn.in_proj_{stacked[2]}", {})[stacked[1]] = value
                continue
            for new, old in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.out_proj", "attn.out_proj"),
            ):
                inner = inner.replace(new, old)
            renamed[f"transformer.resblocks.{layer}.{inner}"] = value
    renamed |= {key: np.concatenate([parts["q"], parts["k"], parts["v"]]) for key, parts in stacks.items()}
    if extra_layer:
        last = max(int(k.split(".")[2]) for k in renamed if "resblocks" in k)
        extra = {
            k.replace(f".{last}.", f".{last + 1}.", 1): v + 1 for k, v in renamed.items() if f"resblocks.{last}." in k
        }
        renamed |= extra | {"text_projection": np.ones((32, 32), np.float32)}
    renamed["logit_scale"] = np.array(4.6, np.float32)
    return {f"{prefix}{key}": value for key, value in renamed.items()}


def states(directory: Path) -> dict[str, dict]:
    """component -> its tensors, moved a little so that they differ from the base's."""
    found = {}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for path in (directory / name).glob("*.safetensors"):
            found[name] = {k: v * np.float32(1.5) + np.float32(0.01) for k, v in load_file(path).items()}
    return found


def checkpoint(kind: str, directory: Path) -> dict:
    """A whole CompVis checkpoint with EMA copies and the buffers of the noise schedule."""
    parts = states(directory)
    state = compvis_unet(parts["unet"]) | compvis_vae(parts["vae"])
    if kind == "sd1":
        state |= {f"cond_stage_model.transformer.{k}": v for k, v in prefixed(parts["text_encoder"]).items()}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    elif kind == "sd2":
        state |= open_clip(parts["text_encoder"], "cond_stage_model.model.", extra_layer=True)
    else:
        state |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in prefixed(parts["text_encoder"]).items()}
        state |= open_clip(parts["text_encoder_2"], "conditioner.embedders.1.model.", extra_layer=False)
    state["model_ema.decay"] = np.array(0.9999, np.float32)
    state["model_ema.num_updates"] = np.array(7)
    state["model_ema.diffusion_modelinput_blocks00bias"] = np.full(32, np.nan, np.float32)
    for name in (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_one_minus_alphas_cumprod",
        "posterior_variance",
    ):
        state[name] = np.linspace(0, 1, 10, dtype=np.float32)
    state["scale_factor"] = np.array(0.18215, np.float32)
    return state


def by_diffusers(kind: str, pipe, state: dict) -> dict[str, dict]:
    """What diffusers makes of the same file."""
    from diffusers.loaders import single_file_utils as theirs

    tensors = {key: torch.tensor(value) for key, value in state.items()}
    found = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(tensors), dict(pipe.unet.config)),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(tensors), dict(pipe.vae.config)),
    }
    if kind == "sd2":
        found["text_encoder"] = theirs.convert_open_clip_checkpoint(pipe.text_encoder, dict(tensors))
    else:
        found["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    if kind == "sdxl":
        prefix = "conditioner.embedders.1.model."
        found["text_encoder_2"] = theirs.convert_open_clip_checkpoint(pipe.text_encoder_2, dict(tensors), prefix=prefix)
    return {name: {k: v.numpy() for k, v in part.items()} for name, part in found.items()}


def write(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        tensors = {key: torch.tensor(value) for key, value in state.items()}
        torch.save(
            {"state_dict": tensors, "epoch": 3, "global_step": 875000} if "wrapped" in path.name else tensors, path
        )
    return path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd1", "x.safetensors"),
        ("sd1", "wrapped.ckpt"),
        ("sd1", "bare.pt"),
        ("sd2", "x.safetensors"),
        ("sdxl", "x.safetensors"),
    ],
)
def test_equals_diffusers_conversion(kind, name, reference, bases, tmp_path):
    pipe, directory = reference(kind)
    state = checkpoint(kind, directory)
    path = write(state, tmp_path / name)
    pipeline = convert.load(path, base=bases(kind))
    for component, expected in by_diffusers(kind, pipe, state).items():
        ours = rename.into_torch(pipeline.params[component])
        # diffusers leaves SD2's last layer to be dropped by the model it loads into.
        expected = {
            k: v
            for k, v in expected.items()
            if "position_ids" not in k and not k.startswith("text_model.encoder.layers.3.")
        }
        if component == "text_encoder":
            expected.pop("text_projection.weight", None)
        assert ours.keys() == expected.keys(), component
        assert all(np.array_equal(ours[key], expected[key]) for key in expected), component
    moved = params_lib.flatten(pipeline.params["unet"])["conv_in.kernel"]
    assert not np.array_equal(moved, params_lib.flatten(bases(kind).params["unet"])["conv_in.kernel"])
    recognised = convert.recognise(path)
    assert recognised.kind == "CompVis checkpoint"
    assert f"unet {len(params_lib.flatten(pipeline.params['unet']))}" in recognised.detail
    assert f"left out: 3 EMA, {6 + (kind != 'sd1')} buffers" in recognised.detail


def test_a_unet_alone(reference, bases, tmp_path):
    """With and without its prefix; the base gives the rest, and is needed."""
    _, directory = reference("sd1")
    unet = compvis_unet(states(directory)["unet"])
    with_prefix = write(unet, tmp_path / "a.safetensors")
    bare = write({k.removeprefix("model.diffusion_model."): v for k, v in unet.items()}, tmp_path / "b.safetensors")
    one, two = (convert.load(path, base=bases("sd1")) for path in (with_prefix, bare))
    for ours in (one, two):
        flat = rename.into_torch(ours.params["unet"])
        assert all(np.array_equal(flat[key], value) for key, value in states(directory)["unet"].items())
        assert ours.params["vae"] is not None and ours.params["text_encoder"].keys()
    with pytest.raises(convert.ConversionError, match=r"holds no vae, text_encoder; pass .* base="):
        convert.load(with_prefix)


def test_every_fault_of_every_component_is_in_one_error(reference, bases, tmp_path):
    state = checkpoint("sd1", reference("sd1")[1])
    del state["model.diffusion_model.input_blocks.0.0.bias"]
    state["model.diffusion_model.input_blocks.1.7.weight"] = np.zeros(3, np.float32)
    state["model.diffusion_model.out.2.bias"] = np.zeros(5, np.float32)
    state["first_stage_model.decoder.mid.attn_1.q.bias"][0] = np.nan
    state["cond_stage_model.transformer.text_model.final_layer_norm.scale"] = np.zeros(2, np.float32)
    state["control_model.zero_convs.0.0.weight"] = np.zeros(1, np.float32)
    path = write(state, tmp_path / "x.safetensors")
    with pytest.raises(convert.ConversionError) as caught:
        convert.load(path, base=bases("sd1"))
    message = str(caught.value)
    for part in (
        "1 missing: conv_in.bias",
        "1 unexpected: model.diffusion_model.input_blocks.1.7.weight",
        "1 wrong shape: model.diffusion_model.out.2.bias (expected (4,), found (5,))",
        "1 NaN or Inf: first_stage_model.decoder.mid.attn_1.q.bias",
        "1 unexpected: cond_stage_model.transformer.text_model.final_layer_norm.scale",
        "1 unexpected: control_model.zero_convs.0.0.weight",
    ):
        assert part in message


def test_a_checkpoint_of_another_family_does_not_fit(reference, bases, tmp_path):
    path = write(checkpoint("sdxl", reference("sdxl")[1]), tmp_path / "x.safetensors")
    with pytest.raises(convert.ConversionError, match=r"holds a text_encoder_2, which .* has not"):
        convert.load(path, base=bases("sd1"))


def test_nothing_but_ema(bases, tmp_path):
    path = write({"model_ema.diffusion_modelout0bias": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(convert.ConversionError, match="holds no weights of a model, only ema"):
        convert.load(path, base=bases("sd1"))


def test_marks_of_velocity_prediction(reference, bases, tmp_path):
    """Fine-tunes mark it with an empty key; a base whose scheduler predicts noise is refused."""
    mark = {"v_pred": np.zeros(0, np.float32)}
    path = write(checkpoint("sd1", reference("sd1")[1]) | mark, tmp_path / "x.safetensors")
    with pytest.raises(convert.ConversionError, match=r"predicts velocity .* prediction_type='epsilon'"):
        convert.load(path, base=bases("sd1"))
    path = write(checkpoint("sd2", reference("sd2")[1]) | mark, tmp_path / "y.safetensors")
    assert convert.load(path, base=bases("sd2")).configs["scheduler"]["prediction_type"] == "v_prediction"


def test_without_a_base_the_family_is_inferred(reference, bases, tmp_path, monkeypatch):
    """The family is told by its width; its tokenizer comes from the cache (here: a folder)."""
    pipe, directory = reference("sd1")
    base = bases("sd1")
    tiny = families.Family("SD1", {**base.configs, "model_index": {}})
    monkeypatch.setattr(families, "FAMILIES", {"SD1": tiny})
    state = checkpoint("sd1", directory)
    path = write(state, tmp_path / "x.safetensors")
    assert "of SD1's width" in convert.recognise(path).detail
    monkeypatch.setattr(families, "VOCABULARY", str(tmp_path / "nothing"))
    with pytest.raises(convert.ConversionError, match=r"a single file holds no tokenizer.*base="):
        convert.load(path)
    monkeypatch.setattr(families, "VOCABULARY", str(directory / "tokenizer"))
    pipeline = convert.load(path)
    ours = rename.into_torch(pipeline.params["unet"])
    expected = by_diffusers("sd1", pipe, state)["unet"]
    assert all(np.array_equal(ours[key], expected[key]) for key in expected)
    assert pipeline_lib.tokenize(pipeline, ["a cat"]).shape == (1, 77)
    del state["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    with pytest.raises(convert.ConversionError, match=r"1 missing: text_model\.final_layer_norm\.bias"):
        convert.load(write(state, tmp_path / "y.safetensors"))


class Shape:
    """A tensor that takes no memory."""

    def __init__(self, *shape):
        self.shape = shape

    def __array__(self, dtype=None, copy=None):
        return np.broadcast_to(np.float32(0), self.shape)


def test_the_components_of_the_families_are_those_with_a_model():
    """A component that a format names needs a model, and each family's own components need a configuration."""
    from spqr_jax.backbones import USUAL_CLASSES

    assert set(families.COMPONENTS) == {*USUAL_CLASSES, "transformer"} and families.NEEDED == ("vae", "text_encoder")
    for family in families.FAMILIES.values():
        assert set(family.configs) <= {*families.COMPONENTS, "scheduler", "model_index"}


@pytest.mark.parametrize("family", ["SD1", "SD2", "SDXL"])
def test_a_family_draws_with_every_sampler_as_its_repository_says(family):
    """Stable Diffusion's scheduler_config.json unsets what diffusers' DDIM does by itself: clipping the latents."""
    config = families.FAMILIES[family].configs["scheduler"]
    ddim = diffusers.DDIMScheduler.from_config(config).config
    assert (ddim.clip_sample, ddim.set_alpha_to_one) == (False, False)
    assert diffusers.PNDMScheduler.from_config(config).config.skip_prk_steps


def test_widths_tell_the_families():
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    found = [families.infer({key: Shape(640, width)}) for width in (768, 1024, 2048, 1280)]
    assert [family and family.name for family in found] == ["SD1", "SD2", "SDXL", None]


def test_sd2_alone_does_not_say_what_it_predicts(reference, tmp_path, monkeypatch, bases):
    tiny = families.Family("SD2", {**bases("sd2").configs, "model_index": {}}, prediction_known=False)
    monkeypatch.setattr(families, "FAMILIES", {"SD2": tiny})
    path = write(checkpoint("sd2", reference("sd2")[1]), tmp_path / "x.safetensors")
    with pytest.raises(convert.ConversionError, match=r"noise or velocity; pass .* base="):
        convert.load(path)


@pytest.mark.parametrize(
    ("family", "component", "count"),
    [
        ("SD1", "unet", 859_520_964),
        ("SD1", "vae", 83_653_863),
        ("SD1", "text_encoder", 123_060_480),
        ("SD2", "unet", 865_910_724),
        ("SD2", "text_encoder", 340_387_840),
        ("SDXL", "unet", 2_567_463_684),
        ("SDXL", "text_encoder_2", 694_659_840),
    ],
)
def test_parameter_counts_of_the_families(family, component, count):
    """Of the models that diffusers and transformers build from the same configs, without allocating them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    makers = {
        "unet": lambda config: UNet2DConditionModel.from_config(config),
        "vae": lambda config: AutoencoderKL.from_config(config),
        "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
        "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    }
    with torch.device("meta"):
        model = makers[component](families.FAMILIES[family].configs[component])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_memory_stays_within_one_copy_of_the_largest_component(reference, bases, tmp_path, monkeypatch):
    """A safetensors file is read one tensor at a time: beside what is kept, the largest tensor and its copy."""
    state = checkpoint("sd1", reference("sd1")[1])
    path = write(state, tmp_path / "x.safetensors")
    base = bases("sd1")
    convert.load(path, base=base)  # what is allocated once
    tracemalloc.start()
    pipeline = convert.load(path, base=base)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(params_lib.nbytes(params) for params in pipeline.params.values())
    assert kept >= total
    assert peak - kept <= 3 * max(value.nbytes for value in state.values()) + (1 << 20)
