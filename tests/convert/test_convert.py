"""Conversion of diffusers directories: what is accepted, and what every kind of bad file says."""

import json
import pickle
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

import convert
from convert import rename
from convert.families import COMPONENTS
from convert.pickled import load_pickled
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib


@pytest.fixture
def directory(reference, tmp_path) -> Path:
    """A copy of the tiny SD1 pipeline that a test may spoil."""
    shutil.copytree(reference("sd1")[1], tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.fixture(scope="module")
def original(reference):
    return convert.load(reference("sd1")[1])


def weights(directory: Path, component: str) -> Path:
    return directory / component / f"{COMPONENTS[component].weights}.safetensors"


def rewrite(path: Path, change) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def refusal(directory: Path) -> str:
    with pytest.raises(convert.ConversionError) as caught:
        convert.load(directory)
    return str(caught.value)


def check_same(ours, expected) -> None:
    ours, expected = params_lib.flatten(ours), params_lib.flatten(expected)
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[path], expected[path]) for path in expected)


def test_every_problem_is_in_one_error(directory):
    def spoil(state):
        del state["conv_in.weight"]
        del state["conv_out.bias"]
        state["extra.weight"] = np.zeros(3, np.float32)
        state["time_embedding.linear_1.weight"] = np.zeros((7, 5), np.float32)
        state["conv_norm_out.weight"][3] = np.nan
        state["conv_norm_out.bias"][0] = np.inf

    rewrite(weights(directory, "unet"), spoil)
    message = refusal(directory)
    assert str(directory / "unet") in message and "does not fit the unet" in message
    assert "2 missing: conv_in.weight, conv_out.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 wrong shape: time_embedding.linear_1.weight (expected (32, 128), found (5, 7))" in message
    assert "2 NaN or Inf: conv_norm_out." in message


def test_a_key_set_twice(directory):
    """The old and the new name of one tensor in one file."""
    key = "decoder.mid_block.attentions.0.to_q.weight"
    rewrite(weights(directory, "vae"), lambda s: s.update({key.replace("to_q", "query"): s[key] + 1}))
    assert "1 set twice: " in refusal(directory)


@pytest.mark.parametrize(("donor", "looks"), [("text_encoder", "a text encoder"), ("vae", "a VAE")])
def test_a_component_in_the_unets_place_says_what_it_is(directory, donor, looks):
    shutil.copy(weights(directory, donor), weights(directory, "unet"))
    message = refusal(directory)
    assert "does not fit the unet" in message and f"It looks like {looks}." in message
    assert "missing: " in message and "unexpected: " in message


@pytest.mark.parametrize(
    ("key", "looks"),
    [
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", "a LoRA"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a CompVis checkpoint"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "a text encoder"),
    ],
)
def test_guesses(key, looks, original):
    _, skeleton = backbones.define("vae", original.configs["vae"])
    with pytest.raises(convert.ConversionError, match=f"It looks like {looks}"):
        rename.from_torch({key: np.zeros(1)}, skeleton, component="vae", source="x")


def test_a_whole_compvis_checkpoint_is_not_taken_for_its_text_encoder(original):
    _, skeleton = backbones.define("unet", original.configs["unet"])
    keys = ["cond_stage_model.transformer.text_model.final_layer_norm.bias", "model.diffusion_model.out.0.weight"]
    with pytest.raises(convert.ConversionError, match="It looks like a CompVis checkpoint"):
        rename.from_torch({key: np.zeros(1) for key in keys}, skeleton, component="unet", source="x")


def test_an_empty_file(original):
    _, skeleton = backbones.define("unet", original.configs["unet"])
    with pytest.raises(convert.ConversionError, match="it holds no tensors"):
        rename.from_torch({}, skeleton, component="unet", source="x", partial=True)


def test_partial_state_dicts(original):
    """Only what is there comes back; what does not belong is still refused."""
    _, skeleton = backbones.define("unet", original.configs["unet"])
    state = rename.into_torch(original.params["unet"])
    part = {key: value for key, value in state.items() if "attn2" in key}
    found = rename.from_torch(part, skeleton, component="unet", source="x", partial=True)
    assert len(params_lib.flatten(found)) == len(part)
    with pytest.raises(convert.ConversionError, match="1 unexpected: nothing"):
        rename.from_torch(part | {"nothing": np.zeros(1)}, skeleton, component="unet", source="x", partial=True)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(directory, keep):
    path = weights(directory, "unet")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = refusal(directory)
    assert str(path) in message and "not a readable safetensors file" in message


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(directory, original, dtype):
    """Every value is one of the file's, widened exactly."""
    for component in COMPONENTS:
        if component in original.params:
            path = weights(directory, component)
            save_file({key: value.astype(dtype) for key, value in load_file(path).items()}, path, {"format": "pt"})
    pipeline = convert.load(directory)
    for component, params in pipeline.params.items():
        expected = params_lib.map_with_path(
            lambda _, leaf: np.asarray(leaf).astype(dtype).astype(np.float32), original.params[component]
        )
        check_same(params, expected)
        assert {leaf.dtype for leaf in params_lib.flatten(params).values()} == {np.dtype(np.float32)}


def test_bfloat16_pipelines_round_trip(directory, original, tmp_path):
    pipeline = convert.load(directory, dtype="bfloat16")
    leaves = params_lib.flatten(pipeline.params["unet"])
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    convert.save_diffusers(pipeline, tmp_path / "out")
    check_same(convert.load(tmp_path / "out", dtype="bfloat16").params["unet"], pipeline.params["unet"])


def test_only_these_dtypes(directory):
    with pytest.raises(ValueError, match=r'dtype must be "float32" or "bfloat16", found \'float16\''):
        convert.load(directory, dtype="float16")


def test_the_fp16_variant_is_taken_when_it_is_all_there_is(directory):
    path = weights(directory, "unet")
    save_file({k: v.astype(np.float16) for k, v in load_file(path).items()}, path.with_suffix(".fp16.safetensors"))
    both = convert.load(directory)
    path.unlink()
    half = convert.load(directory)
    kernels = [np.asarray(p.params["unet"]["conv_in"]["kernel"]) for p in (both, half)]
    assert not np.array_equal(*kernels)
    np.testing.assert_array_equal(kernels[1], kernels[0].astype(np.float16).astype(np.float32))


def to_bin(directory: Path, component: str, save, name: str | None = None) -> Path:
    """Replace a component's safetensors by a pickled file that `save(state, path)` writes."""
    path = weights(directory, component)
    state = {key: torch.tensor(value) for key, value in load_file(path).items()}
    path.unlink()
    target = path.with_name(name or f"{COMPONENTS[component].weights}.bin")
    save(state, target)
    return target


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda state, path: torch.save({"state_dict": state}, path),
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    ],
    ids=["bin", "wrapped", "before PyTorch 1.6"],
)
def test_pickled_weights(directory, original, save):
    to_bin(directory, "unet", save)
    check_same(convert.load(directory).params["unet"], original.params["unet"])


def test_pickled_bfloat16(tmp_path):
    values = torch.randn(5).bfloat16()
    torch.save({"x": values}, tmp_path / "x.pt")
    np.testing.assert_array_equal(load_pickled(tmp_path / "x.pt")["x"], values.float().numpy())


class Attack:
    """Unpickled the ordinary way, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [False, True], ids=["the file itself", "beside tensors"])
@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["torch", "pickle"]
)
def test_a_malicious_pickle_is_refused_and_not_executed(directory, tmp_path, inside, save):
    mark = tmp_path / "executed"
    payload = Attack(mark)
    path = to_bin(directory, "unet", lambda state, p: save(state | {"z": payload} if inside else payload, p))
    message = refusal(directory)
    assert str(path) in message and "nothing else in it is executed" in message
    assert not mark.exists()
    with open(path, "rb") as file:  # the attack is a real one
        if save is not torch.save:
            pickle.load(file)
            assert mark.exists()


def test_pickled_files_without_tensors(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(convert.ConversionError, match="holds list, expected a state dict of tensors"):
        load_pickled(tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(convert.ConversionError, match="could not be opened"):
        load_pickled(tmp_path / "cut.pt")


def test_old_attention_names_of_the_vae(directory, original):
    """Stable Diffusion 1's files were written before diffusers renamed query, key, value and proj_attn."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(state):
        for key in [key for key in state if "attentions" in key]:
            for new, old in names.items():
                if f".{new}." in key:
                    state[key.replace(f".{new}.", f".{old}.")] = state.pop(key)

    rewrite(weights(directory, "vae"), age)
    assert any(".proj_attn." in key for key in load_file(weights(directory, "vae")))
    check_same(convert.load(directory).params["vae"], original.params["vae"])


@pytest.mark.parametrize("prefixed", [True, False])
def test_text_encoders_of_any_transformers(directory, original, prefixed):
    """With position_ids (before 4.31), with and without the text_model prefix."""

    def age(state):
        for key in list(state):
            state[("text_model." if prefixed else "") + key.removeprefix("text_model.")] = state.pop(key)
        state["text_model.embeddings.position_ids"] = np.arange(77)[None]

    rewrite(weights(directory, "text_encoder"), age)
    check_same(convert.load(directory).params["text_encoder"], original.params["text_encoder"])


def test_tokenisation_equals_transformers(directory):
    from transformers import CLIPTokenizer

    pipeline = convert.load(directory)
    theirs = CLIPTokenizer.from_pretrained(str(directory / "tokenizer"))
    texts = ["", "a cat", "A  CAT!", "naïve café, 猫 👩‍🚀", "the dog " * 60]
    ids = pipeline_lib.tokenize(pipeline, texts)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    assert ids.dtype == np.int32 and ids.tolist() == expected
    assert ids[-1, -1] == theirs.eos_token_id and ids[0, 0] == theirs.bos_token_id


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ("unet/diffusion_pytorch_model.safetensors", FileNotFoundError),
        ("unet/config.json", FileNotFoundError),
        ("scheduler/scheduler_config.json", FileNotFoundError),
        ("tokenizer", FileNotFoundError),
        ("model_index.json", convert.ConversionError),
    ],
)
def test_missing_files_are_named(directory, missing, error):
    path = directory / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(error, match=path.name.partition(".")[0]):
        convert.load(directory)


def test_damaged_json_is_named(directory):
    (directory / "unet" / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(directory)


def test_an_index_without_a_unet(directory):
    index = json.loads((directory / "model_index.json").read_text())
    del index["unet"]
    (directory / "model_index.json").write_text(json.dumps(index))
    assert "names no unet" in refusal(directory)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert.load(tmp_path / "nothing")


def test_a_pipeline_passes_through(original):
    assert convert.load(original) is original
