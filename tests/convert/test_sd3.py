"""SD3 in every published form: directories and shards, single files of the original code, adapters, parts."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import convert
from convert import diffusers_dir, families, mmdit, rename
from spqr_jax import backbones
from spqr_jax import params as params_lib
from tests import flow_reference
from tests.convert import dora
from tests.parity.compared import torch_shapes

KIND = "sd35m"  # with every kind of layer
RANK = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(diffusers' pipeline, its directory, ours)."""
    pipe, folder = flow_reference.sd3(KIND), tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    return pipe, folder, convert.load(folder)


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}


PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.mark.parametrize("with_t5", [True, False])
def test_there_and_back(with_t5, tmp_path):
    """load -> save_diffusers -> diffusers gives the same weights, bit for bit, and load the same again."""
    pipe = flow_reference.sd3(KIND, with_t5=with_t5)
    pipe.save_pretrained(tmp_path / "theirs")
    ours = convert.load(tmp_path / "theirs")
    assert set(ours.params) == set(PARTS[: 5 if with_t5 else 4]) and backbones.of(ours).key == "sd3"
    convert.save_diffusers(ours, tmp_path / "ours")
    # diffusers does not load its own directory without T5 unless it is told that there is none.
    none = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "ours", local_files_only=True, **none)
    for name in ours.params:
        same(state_of(getattr(again, name)), state_of(getattr(pipe, name)))
    assert (again.text_encoder_3 is None) == (not with_t5)
    assert again.scheduler.config.shift == 3.0
    for name in ("tokenizer", *(["tokenizer_3"] if with_t5 else [])):
        assert getattr(again, name)("a cat eats").input_ids == getattr(pipe, name)("a cat eats").input_ids


def test_shards_are_written_and_read(saved, tmp_path):
    _, folder, ours = saved
    for name in ("transformer", "text_encoder_3"):
        stem = families.COMPONENTS[name].weights
        (tmp_path / name).mkdir()
        diffusers_dir.save_weights(ours.params[name], tmp_path / name, stem, limit=40_000)
        index = json.loads((tmp_path / name / f"{stem}.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2 and all(len((tmp_path / name / f).read_bytes()) < 60_000 for f in files[:1])
        whole = load_file(folder / name / f"{stem}.safetensors")
        joined = {key: value for file in files for key, value in load_file(tmp_path / name / file).items()}
        same(joined, whole)
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    read = convert.load(tmp_path / "transformer", base=ours)
    same(rename.into_torch(read.params["transformer"]), rename.into_torch(ours.params["transformer"]))
    (tmp_path / "transformer" / files[0].replace("model-", "diffusion_pytorch_model-")).unlink(missing_ok=True)
    gone = next((tmp_path / "transformer").glob("*-00002-of-*"))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone.name} is missing"):
        convert.load(tmp_path / "transformer", base=ours)


def original(pipe, *, with_t5: bool) -> dict[str, np.ndarray]:
    """A single file of Stability's, from the names of its code."""
    state, blocks = {}, flow_reference.SD3["num_layers"]
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, value in state_of(pipe.transformer).items():
        layer, _, leaf = name.rpartition(".")
        where = mmdit.place(name, blocks) or mmdit.place(layer, blocks)
        key = where.layer if name == "pos_embed.pos_embed" else f"{where.layer}.{leaf}"
        value = np.concatenate(np.split(value, 2)[::-1]) if where.swapped else value
        if where.part is None:
            state[f"model.diffusion_model.{key}"] = value
        else:
            stacks.setdefault(key, {})[where.part] = value
    for key, parts in stacks.items():
        state[f"model.diffusion_model.{key}"] = np.concatenate([parts[i] for i in range(3)])
    from tests.convert.test_single_file import compvis_vae

    state |= compvis_vae(state_of(pipe.vae))
    for name, place in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        own = {
            f"text_encoders.{place}.transformer.{key}": value for key, value in state_of(getattr(pipe, name)).items()
        }
        state |= own | {f"text_encoders.{place}.logit_scale": np.float32([4.6])}
    if with_t5:
        t5 = state_of(pipe.text_encoder_3)
        t5["encoder.embed_tokens.weight"] = t5["shared.weight"]
        state |= {f"text_encoders.t5xxl.transformer.{key}": value for key, value in t5.items()}
    return {key: np.ascontiguousarray(value) for key, value in state.items()}


def test_a_single_file_equals_what_diffusers_makes_of_it(saved, tmp_path):
    from diffusers.loaders import single_file_utils

    pipe, _, base = saved
    state = original(pipe, with_t5=True)
    save_file(state, tmp_path / "x.safetensors")
    assert convert.recognise(tmp_path / "x.safetensors").kind == "CompVis checkpoint"
    blank = base.with_params(**{n: params_lib.map_with_path(lambda _, x: x * 0, p) for n, p in base.params.items()})
    ours = convert.load(tmp_path / "x.safetensors", base=blank)
    tensors = {key: torch.tensor(value) for key, value in state.items()}
    theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
    same(rename.into_torch(ours.params["transformer"]), {key: value.numpy() for key, value in theirs.items()})
    for name in PARTS:
        same(rename.into_torch(ours.params[name]), rename.into_torch(base.params[name]))


def test_a_transformer_alone_and_faults_by_name(saved, tmp_path):
    pipe, _, base = saved
    bare = {
        key.removeprefix("model.diffusion_model."): value
        for key, value in original(pipe, with_t5=False).items()
        if key.startswith("model.diffusion_model.")
    }
    save_file(bare, tmp_path / "x.safetensors")
    ours = convert.load(tmp_path / "x.safetensors", base=base)
    same(rename.into_torch(ours.params["transformer"]), rename.into_torch(base.params["transformer"]))
    del bare["final_layer.linear.bias"]
    bare["joint_blocks.0.x_block.attn3.proj.bias"] = np.zeros(2, np.float32)
    save_file(bare, tmp_path / "y.safetensors")
    with pytest.raises(convert.ConversionError) as caught:
        convert.load(tmp_path / "y.safetensors", base=base)
    assert "1 unexpected: joint_blocks.0.x_block.attn3.proj.bias" in str(caught.value)
    assert "1 missing: proj_out.bias" in str(caught.value)


def test_a_part_of_the_transformer_replaces_that_part(saved, tmp_path):
    _, _, base = saved
    state = rename.into_torch(base.params["transformer"])
    part = {key: value + 1 for key, value in state.items() if ".attn.add_" in key}
    save_file(part, tmp_path / "x.safetensors")
    changed = rename.into_torch(convert.load(tmp_path / "x.safetensors", base=base).params["transformer"])
    same(changed, state | part)


def test_a_file_of_another_family_is_refused(saved, reference, tmp_path):
    _, _, base = saved
    unet = load_file(reference("sd1")[1] / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(unet, tmp_path / "unet.safetensors")
    with pytest.raises(convert.ConversionError, match=r"is a UNet, which .* does not have \(it has transformer"):
        convert.load(tmp_path / "unet.safetensors", base=base)
    save_file({"lora_unet_no_layer.lora_down.weight": np.zeros((2, 2), np.float32)}, tmp_path / "lora.safetensors")
    with pytest.raises(convert.ConversionError, match="1 unexpected: lora_unet_no_layer"):
        convert.load(tmp_path / "lora.safetensors", base=base)


def test_faults_of_a_kohya_adapter_are_named_as_its_file_names_them(saved, tmp_path):
    pipe, _, base = saved
    state = as_kohya(adapters(pipe))
    stack, other = "lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_unet_joint_blocks_1_x_block_attn_qkv"
    state[f"{stack}.lora_up.weight"] = state[f"{stack}.lora_up.weight"][:-1]
    del state[f"{other}.lora_down.weight"]
    state["lora_unet_joint_blocks_7_x_block_attn_qkv.alpha"] = np.array(1, np.float32)
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(convert.ConversionError) as caught:
        convert.load(tmp_path / "lora.safetensors", base=base)
    message = str(caught.value)
    assert f"1 wrong shape: {stack}.lora_down.weight" in message
    assert f"down beside {other}.alpha, {other}.lora_up.weight" in message
    assert "1 unexpected: lora_unet_joint_blocks_7_x_block_attn_qkv.alpha" in message


def adapters(pipe) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer -> (down, up) of every linear layer of attention."""
    rng, found = np.random.default_rng(0), {}
    for name, value in state_of(pipe.transformer).items():
        layer = name.removesuffix(".weight")
        if ".attn" in layer and value.ndim == 2:
            found[layer] = (
                rng.standard_normal((RANK, value.shape[1])).astype(np.float32),
                rng.standard_normal((value.shape[0], RANK)).astype(np.float32),
            )
    return found


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_an_adapter_merges_as_in_diffusers(saved, form, tmp_path):
    import copy

    pipe, _, base = saved
    pairs = adapters(pipe)
    config = None
    if form == "kohya":
        # One down for the three of a stack: what diffusers merges has the same down for q, k and v.
        for layer in list(pairs):
            for ending in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
                if layer.endswith(ending):
                    first = layer.replace(ending, ending.replace("k", "q", 1).replace("v", "q", 1))
                    pairs[layer] = (pairs[first][0], pairs[layer][1])
    state = {}
    for layer, (down, up) in pairs.items():
        prefix = {"diffusers": "transformer.", "peft": "base_model.model.", "kohya": "transformer."}[form]
        state[f"{prefix}{layer}.lora_A.weight"], state[f"{prefix}{layer}.lora_B.weight"] = down, up
    theirs = copy.deepcopy(pipe)
    tensors = {key.replace("base_model.model.", "transformer."): torch.tensor(v) for key, v in state.items()}
    theirs.load_lora_weights(tensors)
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    if form == "peft":
        config = {"r": RANK, "lora_alpha": RANK, "peft_type": "LORA"}
    if form == "kohya":
        state = as_kohya(pairs)
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(state, folder / ("adapter_model.safetensors" if form == "peft" else "x.safetensors"))
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    source = folder if form == "peft" else folder / "x.safetensors"
    ours = rename.into_torch(convert.load(source, base=base).params["transformer"])
    for key, value in state_of(theirs.transformer).items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def as_kohya(pairs: dict) -> dict[str, np.ndarray]:
    """Adapters under the names of the original code, stacks as one."""
    state, ups = {}, {}
    for layer, (down, up) in pairs.items():
        where = mmdit.place(layer, flow_reference.SD3["num_layers"])
        name = "lora_unet_" + where.layer.replace(".", "_")
        state[f"{name}.lora_down.weight"] = down
        state[f"{name}.alpha"] = np.array(RANK, np.float32)
        ups.setdefault(name, {})[where.part or 0] = up
    for name, parts in ups.items():
        state[f"{name}.lora_up.weight"] = np.concatenate([parts[i] for i in sorted(parts)])
    return state


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_dora_of_stacked_layers(side, saved, tmp_path):
    """As PEFT merges it into the layers of the original code, and diffusers converts these."""
    from diffusers.loaders import single_file_utils

    pipe, _, base = saved
    prefix = "model.diffusion_model."
    whole = {key: value for key, value in original(pipe, with_t5=False).items() if key.startswith(prefix)}
    state = {key.removeprefix(prefix): value for key, value in whole.items()}
    layers = ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.context_block.attn.qkv"]
    layers += ["joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.x_block.mlp.fc1"]
    layers += ["final_layer.adaLN_modulation.1"]
    file, merged = dora.adapters(state, layers, side)
    save_file(file, tmp_path / "x.safetensors")
    ours = rename.into_torch(convert.load(tmp_path / "x.safetensors", base=base).params["transformer"])
    tensors = {prefix + key: torch.tensor(value) for key, value in merged.items()}
    theirs = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value.numpy(), rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("family", ["SD3", "SD3.5 medium", "SD3.5 large"])
def test_families_tell_themselves(family):
    class Shaped:
        def __init__(self, *shape):
            self.shape = shape

        def __array__(self, dtype=None, copy=None):
            return np.broadcast_to(np.float32(0), self.shape)

    config = families.FAMILIES[family].configs["transformer"]
    width = config["caption_projection_dim"]
    state = {"model.diffusion_model.x_embedder.proj.weight": Shaped(width, 16, 2, 2)}
    if config.get("dual_attention_layers"):
        state["model.diffusion_model.joint_blocks.0.x_block.attn2.proj.weight"] = Shaped(width, width)
    assert families.infer(state).name == family


def test_text_encoders_of_sd3_have_the_published_parameters():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    for name, count in (("text_encoder", 123_650_304), ("text_encoder_2", 694_659_840)):
        config = families.FAMILIES["SD3"].configs[name]
        with torch.device("meta"):
            model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert torch_shapes(backbones.define(name, config)[1]) == shapes
        assert sum(np.prod(shape) for shape in shapes.values()) == count


def test_a_t5_encoder_alone(saved, reference, tmp_path):
    """A directory of transformers, whose table of tokens has two names; and what it does not fit."""
    pipe, _, base = saved
    blank = base.with_params(text_encoder_3=params_lib.map_with_path(lambda _, x: x * 0, base.params["text_encoder_3"]))
    pipe.text_encoder_3.save_pretrained(tmp_path / "t5")
    ours = convert.load(tmp_path / "t5", base=blank)
    same(rename.into_torch(ours.params["text_encoder_3"]), rename.into_torch(base.params["text_encoder_3"]))
    with pytest.raises(convert.ConversionError, match=r"is a T5 encoder, which .* does not have"):
        convert.load(tmp_path / "t5", base=convert.load(reference("sd1")[1]))
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config | {"d_model": 64}))
    with pytest.raises(convert.ConversionError, match=r"text_encoder_3 .* states of 64 numbers, expected 32"):
        convert.load(tmp_path / "t5", base=base)
