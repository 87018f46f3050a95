"""FLUX's weights in every published form: what is loaded equals what diffusers and PEFT load from the same file."""

import copy
import inspect
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils

import convert
from convert import kinds, rename
from spqr_jax import params as params_lib
from tests import flux_reference as flux
from tests.convert import dora

DIM = flux.TRANSFORMER["attention_head_dim"] * flux.TRANSFORMER["num_attention_heads"]
RANK = 4


@pytest.fixture(scope="module")
def bases():
    return {kind: convert.load(flux.saved(kind)[1]) for kind in flux.KINDS}


def of_this_size(function):
    """A function of diffusers that holds the widths of the published FLUX.1, for the small one."""
    source = inspect.getsource(function).replace("12288", str(4 * DIM)).replace("3072", str(DIM))
    names = dict(vars(inspect.getmodule(function)))
    exec(source, names)
    return names[function.__name__]


def original(kind: str) -> dict[str, np.ndarray]:
    """A transformer's random state dict under the names of the original code."""
    rng = np.random.default_rng(0)
    linears = {
        "img_in": (DIM, 64),
        "txt_in": (DIM, flux.TRANSFORMER["joint_attention_dim"]),
        "final_layer.linear": (64, DIM),
        "final_layer.adaLN_modulation.1": (2 * DIM, DIM),
    }
    for name, width in {"time_in": 256, "vector_in": flux.CLIP["hidden_size"], "guidance_in": 256}.items():
        if name != "guidance_in" or kind == "dev":
            linears |= {f"{name}.in_layer": (DIM, width), f"{name}.out_layer": (DIM, DIM)}
    scales = []
    for i in range(flux.TRANSFORMER["num_layers"]):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linears |= {f"{block}_mod.lin": (6 * DIM, DIM), f"{block}_attn.qkv": (3 * DIM, DIM)}
            linears |= {f"{block}_attn.proj": (DIM, DIM), f"{block}_mlp.0": (4 * DIM, DIM)}
            linears |= {f"{block}_mlp.2": (DIM, 4 * DIM)}
            scales += [f"{block}_attn.norm.{part}_norm.scale" for part in ("query", "key")]
    for i in range(flux.TRANSFORMER["num_single_layers"]):
        block = f"single_blocks.{i}"
        linears |= {f"{block}.modulation.lin": (3 * DIM, DIM), f"{block}.linear1": (7 * DIM, DIM)}
        linears |= {f"{block}.linear2": (DIM, 5 * DIM)}
        scales += [f"{block}.norm.{part}_norm.scale" for part in ("query", "key")]
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= dict.fromkeys(scales, (flux.TRANSFORMER["attention_head_dim"],))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def expected(state) -> dict[str, np.ndarray]:
    """diffusers' conversion of a state dict under the original names."""
    convert_it = of_this_size(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    found = convert_it({key: torch.tensor(value) for key, value in state.items()})
    return {key: tensor.numpy() for key, tensor in found.items()}


def refusal(source, base) -> str:
    with pytest.raises(convert.ConversionError) as caught:
        convert.load(source, base=base)
    return str(caught.value)


# --- single files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", flux.KINDS)
def test_the_original_names(bases, kind, prefix, tmp_path):
    state = original(kind)
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "flux1.safetensors")
    loaded = convert.load(tmp_path / "flux1.safetensors", base=bases[kind])
    found, theirs = rename.into_torch(loaded.params["transformer"]), expected(state)
    assert found.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_array_equal(found[key], theirs[key], err_msg=key)
    kept = params_lib.flatten(bases[kind].params["text_encoder_2"])
    assert all(x is kept[path] for path, x in params_lib.flatten(loaded.params["text_encoder_2"]).items())


def test_every_fault_is_named_as_the_file_names_it(bases, tmp_path):
    state = original("dev")
    del state["double_blocks.0.txt_mlp.2.bias"]
    state["single_blocks.1.linear1.weight"] = state["single_blocks.1.linear1.weight"][:-1]
    state["double_blocks.7.img_attn.proj.weight"] = np.zeros((1, 1), np.float32)
    save_file(state, tmp_path / "x.safetensors")
    message = refusal(tmp_path / "x.safetensors", bases["dev"])
    assert "1 missing: transformer_blocks.0.ff_context.net.2.bias" in message
    assert "4 wrong shape: single_blocks.1.linear1.weight[0]" in message
    assert "1 unexpected: double_blocks.7.img_attn.proj.weight" in message


def test_dev_and_schnell_are_not_taken_for_each_other(bases, tmp_path):
    for kind, other, fault in (("dev", "schnell", "4 unexpected: guidance_in."), ("schnell", "dev", "4 missing: ")):
        save_file(original(kind), tmp_path / f"{kind}.safetensors")
        assert fault in refusal(tmp_path / f"{kind}.safetensors", bases[other])


def test_a_file_of_another_family_is_refused_in_one_line(bases, reference, tmp_path):
    save_file(original("dev"), tmp_path / "flux.safetensors")
    save_file({f"model.diffusion_model.{k}": v for k, v in original("dev").items()}, tmp_path / "whole.safetensors")
    unet, sd = reference("sd1")[1] / "unet" / "diffusion_pytorch_model.safetensors", convert.load(reference("sd1")[1])
    for source, base, message in (
        (tmp_path / "flux.safetensors", sd, "is a transformer, which .* does not have"),
        (tmp_path / "whole.safetensors", sd, "belongs to a FluxTransformer2DModel, and .* UNet2DConditionModel"),
        (unet, bases["dev"], "is a UNet, which .* does not have"),
    ):
        with pytest.raises(convert.ConversionError, match=message):
            convert.load(source, base=base)


def test_a_transformer_needs_a_base(tmp_path):
    save_file(original("dev"), tmp_path / "x.safetensors")
    assert "this is a transformer" in refusal(tmp_path / "x.safetensors", None)
    assert convert.recognise(tmp_path / "x.safetensors").kind == kinds.TRANSFORMER


# --- directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["attn.add_", "single_transformer_blocks.1."])
def test_partial_state_dicts(bases, part, tmp_path):
    whole = load_file(flux.saved("dev")[1] / "transformer" / "diffusion_pytorch_model.safetensors")
    state = {f"transformer.{key}": value + 1 for key, value in whole.items() if part in key}
    save_file(state, tmp_path / "x.safetensors")
    found = rename.into_torch(convert.load(tmp_path / "x.safetensors", base=bases["dev"]).params["transformer"])
    for key, value in whole.items():
        np.testing.assert_array_equal(found[key], value + (part in key), err_msg=key)


def sharded(directory):
    """The transformer's weights of a saved pipeline, cut into two files and an index."""
    folder = directory / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(sorted(state))}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_sharded_directories(bases, tmp_path):
    directory = tmp_path / "flux"
    shutil.copytree(flux.saved("dev")[1], directory)
    names = sharded(directory)
    found, before = convert.load(directory).params["transformer"], bases["dev"].params["transformer"]
    assert all(np.array_equal(x, params_lib.flatten(before)[p]) for p, x in params_lib.flatten(found).items())
    (directory / "transformer" / names[1]).unlink()
    (directory / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"is never read")
    with pytest.raises(FileNotFoundError, match=names[1]):
        convert.load(directory)


def test_a_t5_that_is_not_there(tmp_path):
    directory = tmp_path / "flux"
    shutil.copytree(flux.saved("dev")[1], directory)
    shutil.rmtree(directory / "text_encoder_2")
    with pytest.raises(FileNotFoundError, match="text_encoder_2"):
        convert.load(directory)
    index = json.loads((directory / "model_index.json").read_text()) | {"text_encoder_2": [None, None]}
    (directory / "model_index.json").write_text(json.dumps(index))
    message = refusal(directory, None)
    assert (
        "has the components text_encoder, transformer, vae; expected those of one of" in message and "FLUX.1" in message
    )


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_alone(bases, component, tmp_path):
    """Of any file name: CLIP is told by its width, T5 by its layers."""
    state = load_file(flux.saved("dev")[1] / component / "model.safetensors")
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / "x.safetensors")
    changed = convert.load(tmp_path / "x.safetensors", base=bases["dev"])
    before, after = (params_lib.flatten(p.params[component]) for p in (bases["dev"], changed))
    assert all(np.array_equal(after[path], before[path] + 1) for path in before)


# --- adapters -------------------------------------------------------------------------------------------------------

LAYERS = {
    "transformer_blocks.0.attn.to_q": (DIM, DIM),
    "transformer_blocks.1.attn.to_out.0": (DIM, DIM),
    "transformer_blocks.0.attn.add_k_proj": (DIM, DIM),
    "transformer_blocks.1.ff_context.net.0.proj": (4 * DIM, DIM),
    "single_transformer_blocks.1.attn.to_v": (DIM, DIM),
    "single_transformer_blocks.0.proj_out": (DIM, 5 * DIM),
}
ORIGINAL_LAYERS = {
    "double_blocks_0_img_attn_qkv": (3 * DIM, DIM),
    "double_blocks_1_txt_attn_qkv": (3 * DIM, DIM),
    "double_blocks_1_img_attn_proj": (DIM, DIM),
    "double_blocks_0_txt_mod_lin": (6 * DIM, DIM),
    "double_blocks_0_img_mlp_2": (DIM, 4 * DIM),
    "single_blocks_0_linear1": (7 * DIM, DIM),
    "single_blocks_1_linear2": (DIM, 5 * DIM),
    "single_blocks_1_modulation_lin": (3 * DIM, DIM),
}


def pairs(layers, down: str, up: str, alpha: str | None = None) -> dict[str, np.ndarray]:
    """Random factors of these layers under names with the layer in the place of {}."""
    rng, state = np.random.default_rng(0), {}
    for layer, (rows, columns) in layers.items():
        state[down.format(layer)] = rng.standard_normal((RANK, columns)).astype(np.float32) * 0.1
        state[up.format(layer)] = rng.standard_normal((rows, RANK)).astype(np.float32) * 0.1
        if alpha:
            state[alpha.format(layer)] = np.array(3.0, np.float32)
    return state


FORMS = {
    "diffusers": pairs(LAYERS, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "kohya": pairs(
        ORIGINAL_LAYERS, "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"
    ),
}


def fused(state) -> dict[str, np.ndarray]:
    """The transformer's weights after diffusers loaded and fused the adapters."""
    pipe = copy.deepcopy(flux.saved("dev")[0])
    pipe.load_lora_weights({key: torch.tensor(value) for key, value in state.items()})
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {key: value.numpy() for key, value in pipe.transformer.state_dict().items()}


def check(loaded, base, theirs) -> None:
    found, before = (rename.into_torch(p.params["transformer"]) for p in (loaded, base))
    assert found.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_allclose(found[key], theirs[key], rtol=1e-5, atol=2e-7, err_msg=key)
    assert any(not np.array_equal(found[key], before[key]) for key in found)


@pytest.mark.parametrize("form", FORMS)
def test_adapters(bases, form, monkeypatch, tmp_path):
    function = "_convert_kohya_flux_lora_to_diffusers"
    monkeypatch.setattr(lora_pipeline, function, of_this_size(getattr(lora_conversion_utils, function)))
    save_file(FORMS[form], tmp_path / "x.safetensors")
    check(convert.load(tmp_path / "x.safetensors", base=bases["dev"]), bases["dev"], fused(FORMS[form]))
    kind, detail = convert.recognise(tmp_path / "x.safetensors")
    assert kind == "LoRA" and f"rank {RANK} in {form} form" in detail


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_dora_of_stacked_layers(side, bases, tmp_path):
    """As PEFT merges it into the layers of the original code, and diffusers converts these."""
    state = original("dev")
    save_file(state, tmp_path / "flux1.safetensors")
    base = convert.load(tmp_path / "flux1.safetensors", base=bases["dev"])
    layers = ["double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.qkv", "double_blocks.0.txt_mod.lin"]
    layers += ["single_blocks.0.linear1", "single_blocks.1.linear2", "final_layer.adaLN_modulation.1"]
    file, merged = dora.adapters(state, layers, side)
    save_file(file, tmp_path / "x.safetensors")
    check(convert.load(tmp_path / "x.safetensors", base=base), base, expected(merged))


def test_a_directory_of_peft(bases, tmp_path):
    model = copy.deepcopy(flux.saved("dev")[0].transformer)
    targets = ["attn.to_q", "attn.add_v_proj", "proj_mlp"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=targets))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    theirs = {key: value.numpy() for key, value in adapted.merge_and_unload().state_dict().items()}
    check(convert.load(tmp_path, base=bases["dev"]), bases["dev"], theirs)


def test_an_adapter_of_another_family_is_refused_in_one_line(bases, reference, tmp_path):
    save_file(FORMS["kohya"], tmp_path / "flux.safetensors")
    of_unet = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": np.zeros((4, 4))}
    save_file(of_unet, tmp_path / "sd.safetensors")
    sd = convert.load(reference("sd1")[1])
    assert "belongs to a FluxTransformer2DModel" in refusal(tmp_path / "flux.safetensors", sd)
    assert "belongs to a UNet2DConditionModel" in refusal(tmp_path / "sd.safetensors", bases["dev"])
