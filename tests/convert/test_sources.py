"""What `convert.load` takes: components alone, whole or partial, and how each is told from the others."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

import convert
from convert import __main__ as command
from convert import hub, kinds, rename
from spqr_jax import backbones
from spqr_jax import params as params_lib

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def base(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def sdxl(reference):
    return convert.load(reference("sdxl")[1])


def moved(directory: Path, component: str) -> dict[str, np.ndarray]:
    """A component's tensors, moved a little so that they differ from the base's."""
    (path,) = (directory / component).glob("*.safetensors")
    return {key: value * np.float32(1.5) + np.float32(0.01) for key, value in load_file(path).items()}


def prefixed(state: dict) -> dict:
    """Transformers' keys with `text_model.`, whichever version wrote them."""
    return {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items()}


def write(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        torch.save({key: torch.tensor(value) for key, value in state.items()}, path)
    return path


def check(pipeline, base, component: str, expected: dict) -> None:
    """The component equals `expected`, all others the base."""
    for name, params in pipeline.params.items():
        ours = rename.into_torch(params)
        theirs = expected if name == component else rename.into_torch(base.params[name])
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs), name


# --- UNet and VAE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin", "x.pth"])
@pytest.mark.parametrize("prefix", ["", "unet.", "module."])
def test_whole_unets(name, prefix, reference, base, tmp_path):
    state = moved(reference("sd1")[1], "unet")
    path = write({prefix + key: value for key, value in state.items()}, tmp_path / name)
    assert convert.recognise(path) == ("UNet", f"{len(state)} tensors")
    check(convert.load(path, base=base), base, "unet", state)


def test_the_base_may_be_a_source_and_is_cast(reference, base, tmp_path):
    path = write(moved(reference("sd1")[1], "unet"), tmp_path / "x.safetensors")
    for given in (reference("sd1")[1], str(reference("sd1")[1]), base):
        pipeline = convert.load(path, base=given, dtype="bfloat16")
        leaves = [leaf for params in pipeline.params.values() for leaf in params_lib.flatten(params).values()]
        assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
        assert pipeline.name == str(path)


@pytest.mark.parametrize("end", ["attn2.to_k.weight", "attn2.to_v.weight", "conv_in.bias"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_partial_unets(end, name, reference, base, tmp_path):
    """Closed-form edits publish two matrices per layer: those change, the rest stays the base's."""
    whole = moved(reference("sd1")[1], "unet")
    part = {key: value for key, value in whole.items() if key.endswith(end)}
    assert 0 < len(part) < 0.1 * len(whole)
    pipeline = convert.load(write(part, tmp_path / name), base=base)
    check(pipeline, base, "unet", rename.into_torch(base.params["unet"]) | part)


def test_a_partial_unet_in_half_precision(reference, base, tmp_path):
    part = {k: v for k, v in moved(reference("sd1")[1], "unet").items() if "attn2" in k}
    torch.save({key: torch.tensor(value).bfloat16() for key, value in part.items()}, tmp_path / "x.pt")
    rounded = {key: torch.tensor(value).bfloat16().float().numpy() for key, value in part.items()}
    pipeline = convert.load(tmp_path / "x.pt", base=base)
    check(pipeline, base, "unet", rename.into_torch(base.params["unet"]) | rounded)


def test_a_damaged_whole_is_no_partial_checkpoint(reference, base, tmp_path):
    state = moved(reference("sd1")[1], "unet")
    del state["mid_block.resnets.0.conv1.bias"]
    with pytest.raises(convert.ConversionError, match=r"1 missing: mid_block\.resnets\.0\.conv1\.bias"):
        convert.load(write(state, tmp_path / "x.pt"), base=base)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_component_directories(component, reference, base, tmp_path):
    state = moved(reference("sd1")[1], component)
    shutil.copytree(reference("sd1")[1] / component, tmp_path / component)
    write(state, tmp_path / component / f"{WEIGHTS[component]}.safetensors")
    expected = prefixed(state) if component == "text_encoder" else state
    check(convert.load(tmp_path / component, base=base), base, component, expected)
    with pytest.raises(convert.ConversionError, match="pass it with base="):
        convert.load(tmp_path / component)


def test_a_component_directory_in_shards(reference, base, tmp_path):
    state = moved(reference("sd1")[1], "unet")
    keys = sorted(state)
    halves = {"a.safetensors": keys[: len(keys) // 2], "b.safetensors": keys[len(keys) // 2 :]}
    for name, part in halves.items():
        write({key: state[key] for key in part}, tmp_path / name)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    where = {key: name for name, part in halves.items() for key in part}
    index.write_text(json.dumps({"weight_map": where}))
    check(convert.load(tmp_path, base=base), base, "unet", state)
    index.write_text(json.dumps({"weight_map": where | {"extra": "a.safetensors"}}))
    with pytest.raises(convert.ConversionError, match="1 missing: extra"):
        convert.load(tmp_path, base=base)
    index.write_text(json.dumps({"weight_map": where | {"extra": "../a.safetensors"}}))
    with pytest.raises(convert.ConversionError, match="points outside its folder"):
        convert.load(tmp_path, base=base)


def test_a_unet_of_another_family_does_not_fit(reference, sdxl):
    with pytest.raises(convert.ConversionError, match="addition_embed_type=None, expected 'text_time'"):
        convert.load(reference("sd1")[1] / "unet", base=sdxl)


def test_a_folder_with_several_weight_files(reference, base, tmp_path):
    state = moved(reference("sd1")[1], "unet")
    write(state, tmp_path / "ep1.pt")
    check(convert.load(tmp_path, base=base), base, "unet", state)
    write(state, tmp_path / "ep2.pt")
    with pytest.raises(convert.ConversionError, match=r"several weight files \(ep1\.pt, ep2\.pt\)"):
        convert.load(tmp_path, base=base)


# --- text encoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["with prefix", "without", "wrapped", "compvis", "position_ids"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_text_encoder_state_dicts(form, name, reference, base, tmp_path):
    expected = prefixed(moved(reference("sd1")[1], "text_encoder"))
    state = dict(expected)
    if form == "without":
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    if form == "wrapped":
        state = {f"text_encoder.{key}": value for key, value in state.items()}
    if form == "compvis":
        state = {f"cond_stage_model.transformer.{key}": value for key, value in state.items()}
    if form == "position_ids":
        state["text_model.embeddings.position_ids"] = np.arange(77)[None]
    path = write(state, tmp_path / name)
    assert convert.recognise(path).kind == "text encoder"
    check(convert.load(path, base=base), base, "text_encoder", expected)


def advunlearn(state: dict) -> dict:
    """AdvUnlearn's wrapper: the encoder, and three of its parts again under other names."""
    aliases = {"embeddings.": "embedding.", "encoder.": "encoder.", "final_layer_norm.": "final_layer_norm."}
    wrapped = {f"text_encoder.{key}": value for key, value in state.items()}
    for key, value in state.items():
        inner = key.removeprefix("text_model.")
        old = next(name for name in aliases if inner.startswith(name))
        wrapped[aliases[old] + inner[len(old) :]] = value
    return wrapped


def test_advunlearns_wrapper(reference, base, tmp_path):
    expected = prefixed(moved(reference("sd1")[1], "text_encoder"))
    state = advunlearn(expected)
    assert len(state) == 2 * len(expected)
    check(convert.load(write(state, tmp_path / "x.pt"), base=base), base, "text_encoder", expected)
    state["final_layer_norm.bias"] = state["final_layer_norm.bias"] + 1
    with pytest.raises(convert.ConversionError, match=r"1 set twice with different values: final_layer_norm\.bias"):
        convert.load(write(state, tmp_path / "y.pt"), base=base)


def test_clip_models(reference, base, tmp_path):
    """A whole transformers CLIPModel: its text half is taken, with its own config."""
    from transformers import CLIPConfig, CLIPModel

    text = reference("sd1")[0].text_encoder.config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16}))
    clip.save_pretrained(tmp_path / "clip")
    theirs = {k: v.numpy() for k, v in clip.state_dict().items() if k.startswith("text_model.") and "ids" not in k}
    pipeline = convert.load(tmp_path / "clip", base=base)
    check(pipeline, base, "text_encoder", theirs)
    assert pipeline.configs["text_encoder"]["hidden_act"] == "quick_gelu"
    note = tmp_path / "clip" / "config.json"
    sparse = json.loads(note.read_text())  # older files leave out what has its default value
    for name in ("max_position_embeddings", "hidden_act"):
        sparse["text_config"].pop(name, None)
    note.write_text(json.dumps(sparse))
    again = convert.load(tmp_path / "clip", base=base)
    np.testing.assert_array_equal(
        backbones.condition(again, ["a cat"]).context, backbones.condition(pipeline, ["a cat"]).context
    )
    path = write({k: v.numpy() for k, v in clip.state_dict().items()}, tmp_path / "x.bin")
    check(convert.load(path, base=base), base, "text_encoder", theirs)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_sdxl_has_two_text_encoders(component, reference, sdxl, tmp_path):
    """The second is told by its projection here, and by its folder's name."""
    state = prefixed(moved(reference("sdxl")[1], component))
    check(convert.load(write(state, tmp_path / "x.safetensors"), base=sdxl), sdxl, component, state)
    check(
        convert.load(write({f"{component}.{k}": v for k, v in state.items()}, tmp_path / "x.pt"), base=sdxl),
        sdxl,
        component,
        state,
    )
    shutil.copytree(reference("sdxl")[1] / component, tmp_path / component)
    write(state, tmp_path / component / "model.safetensors")
    check(convert.load(tmp_path / component, base=sdxl), sdxl, component, state)


def test_a_text_encoder_of_another_width(reference, base):
    with pytest.raises(convert.ConversionError, match="77 states of 16 numbers, expected 77 of 32"):
        convert.load(reference("sdxl")[1] / "text_encoder", base=base)


def test_a_text_encoder_is_never_a_unet(reference, base, tmp_path):
    """In the place of the whole, with a UNet's name, and wrapped: told for what it is, and the UNet stays."""
    state = prefixed(moved(reference("sd1")[1], "text_encoder"))
    for form in (state, advunlearn(state)):
        path = write(form, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(convert.ConversionError, match=r"this is a text encoder .* pass it with base="):
            convert.load(path)
        pipeline = convert.load(path, base=base)
        assert pipeline.params["unet"] is not None
        check(pipeline, base, "text_encoder", state)
    mixed = state | {"conv_in.weight": np.zeros((32, 4, 3, 3), np.float32)}
    with pytest.raises(convert.ConversionError, match="unexpected: "):
        convert.load(write(mixed, tmp_path / "mixed.safetensors"), base=base)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_files_of_no_known_kind(tmp_path, base):
    write({"weight": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(convert.ConversionError, match=r"no kind that can be loaded: it holds 1 tensors \(weight\)"):
        convert.load(tmp_path / "x.safetensors", base=base)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(convert.ConversionError, match=r"is no weight file; expected \.safetensors, \.bin"):
        convert.load(tmp_path / "x.txt", base=base)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", kinds.UNET),
        ("conv_in.weight", kinds.UNET),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", kinds.VAE),
        ("encoder.layers.0.self_attn.q_proj.weight", kinds.TEXT_ENCODER),
        ("transformer.resblocks.0.attn.in_proj_weight", kinds.TEXT_ENCODER),
        ("output_blocks.3.1.norm.weight", kinds.COMPVIS),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight", kinds.LORA),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", kinds.LORA),
        ("visual.conv1.weight", kinds.UNKNOWN),
    ],
)
def test_kinds(key, kind):
    assert kinds.kind_of([key]) == kind


# --- the hub -------------------------------------------------------------------------------------------------------


REPOSITORY = [
    "README.md",
    "model_index.json",
    "v1-5-pruned.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    *[f"unet/{n}" for n in ("config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors")],
    *[f"vae/{n}" for n in ("config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin")],
    *[f"text_encoder/{n}" for n in ("config.json", "model.safetensors.index.json", "model.fp16.safetensors")],
    *[f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)],
]


def test_only_one_set_of_weights_is_downloaded():
    assert hub.wanted(REPOSITORY) == [
        "model_index.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/config.json",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
    ]
    assert hub.wanted(REPOSITORY, "vae") == ["vae/config.json", "vae/diffusion_pytorch_model.bin"]
    assert hub.wanted(REPOSITORY, "unet/diffusion_pytorch_model.bin") == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
    ]


def test_only_a_hub_source_downloads(reference, monkeypatch):
    directory, calls = reference("sd1")[1], []

    def download(repo, *, revision, allow_patterns):
        calls.append((repo, revision, allow_patterns))
        return str(directory)

    files = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo, revision: [*files, "a.pt", "b.pt"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match='To download it, write "hub:owner/name"'):
        convert.load("owner/name")
    assert not calls
    whole = convert.load("hub:owner/name@v1.0")
    part = convert.load("hub:owner/name/unet", base=whole)
    assert calls[0][:2] == ("owner/name", "v1.0") and "a.pt" not in calls[0][2]
    unet = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert calls[1] == ("owner/name", None, unet)
    assert set(part.params) == {"unet", "vae", "text_encoder"}
    with pytest.raises(ValueError, match=r"does not say which weights; name one of .*a\.pt, b\.pt"):
        convert.load("hub:owner/name/tokenizer")
    assert len(calls) == 2


@pytest.mark.parametrize("source", ["hub:name", "hub:owner/name/../../etc", "hub:https://x/y", "hub:owner/name//x"])
def test_malformed_hub_sources(source):
    with pytest.raises(ValueError, match="is no hub source; expected hub:owner/name"):
        convert.load(source)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command(reference, base, tmp_path, capsys):
    state = moved(reference("sd1")[1], "unet")
    path, out = write(state, tmp_path / "x.safetensors"), tmp_path / "out"
    assert command.main([str(path), "--base", str(reference("sd1")[1]), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{path}: UNet: {len(state)} tensors" in printed
    count = sum(value.size for value in state.values())
    assert f"unet: {len(state)} tensors, {count:,} parameters, float32" in printed
    for file in (path, *out.rglob("*.safetensors")):
        assert f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}  {file}" in printed
    check(convert.load(out), base, "unet", state)


def test_the_command_says_what_is_wrong_and_writes_nothing(reference, tmp_path, capsys):
    path = write(moved(reference("sd1")[1], "unet"), tmp_path / "x.safetensors")
    assert command.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "pass it with base=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_half_written(base, tmp_path, monkeypatch):
    """A disk that fills while writing leaves the old directory as it was, and no scraps beside it."""
    out = tmp_path / "out"
    convert.save_diffusers(base, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(sys.modules["convert.diffusers_dir"], "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        convert.save_diffusers(base, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]
