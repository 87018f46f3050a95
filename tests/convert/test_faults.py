"""Damaged and hostile weight files: refused, named, and nothing unpacked or executed."""

import json
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

import convert
from convert import rename
from convert.pickled import load_pickled

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def base(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture
def state(reference) -> dict[str, np.ndarray]:
    return load_file(reference("sd1")[1] / "unet" / "diffusion_pytorch_model.safetensors")


def refusal(path: Path, base) -> str:
    before = {name: rename.into_torch(params) for name, params in base.params.items()}
    with pytest.raises(convert.ConversionError) as caught:
        convert.load(path, base=base)
    for name, params in base.params.items():  # the base is a value: nothing was written into it
        after = rename.into_torch(params)
        assert all(np.array_equal(after[key], before[name][key]) for key in after)
    return str(caught.value)


def write(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({key: torch.tensor(value) for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("partial", [True, False])
def test_nan_and_inf(name, bad, partial, state, base, tmp_path):
    state[KEY][3, 4] = bad
    chosen = {key: value for key, value in state.items() if "attn2" in key} if partial else state
    assert f"1 NaN or Inf: {KEY}" in refusal(write(chosen, tmp_path / name), base)


def test_numbers_too_large_for_the_dtype(state, base, tmp_path):
    """A float64 tensor that overflows float32 would be Inf after the cast."""
    state[KEY] = np.full(state[KEY].shape, 1e300)
    with np.errstate(over="ignore"):
        assert f"1 NaN or Inf: {KEY}" in refusal(write(state, tmp_path / "x.safetensors"), base)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("key", [KEY, "conv_norm_out.weight"])
def test_bytes_in_the_wrong_order(dtype, key, state, base, tmp_path):
    """Random weights become absurdly large, ones absurdly small, or NaN: each is named."""
    state = {k: v.astype(dtype) for k, v in state.items()}
    if key == "conv_norm_out.weight":
        state[key] = np.ones_like(state[key])
    swapped = state[key].view(f"u{state[key].itemsize}").byteswap().view(dtype)
    path = write(state | {key: swapped}, tmp_path / "x.safetensors")
    message = refusal(path, base)
    assert f"1 wrong byte order?: {key}" in message or f"1 NaN or Inf: {key}" in message


def test_a_header_in_the_wrong_order(state, base, tmp_path):
    path = write(state, tmp_path / "x.safetensors")
    content = path.read_bytes()
    path.write_bytes(struct.pack(">Q", struct.unpack("<Q", content[:8])[0]) + content[8:])
    assert "not a readable safetensors file" in refusal(path, base)


def test_a_pickle_from_a_big_endian_machine(tmp_path):
    """PyTorch marks its byte order, so such a file is read right, not refused."""
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    torch.save({"x": values}, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for record in little.infolist():
            content = little.read(record)
            if record.filename.endswith("byteorder"):
                content = b"big"
            if "/data/" in record.filename:
                content = np.frombuffer(content, "<u4").byteswap().tobytes()
            big.writestr(record.filename, content)
    np.testing.assert_array_equal(load_pickled(tmp_path / "big.pt")["x"], values.numpy())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_masks_are_no_weights(name, state, base, tmp_path):
    """Saliency masks carry the parameters' names and shapes, with 0 and 1 inside."""
    masks = {key: (value > 0).astype(np.int64) for key, value in state.items()}
    message = refusal(write(masks, tmp_path / name), base)
    assert f"{len(masks)} not floating point: " in message and f"{KEY} (int64)" in message


@pytest.mark.parametrize("keep", [0, 7, 0.3, -1])
def test_truncated_pickles(keep, state, base, tmp_path):
    path = write(state, tmp_path / "x.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = refusal(path, base)
    assert str(path) in message and "could not be opened" in message


def test_a_safetensors_header_that_promises_more_than_there_is(base, tmp_path):
    header = json.dumps({"conv_in.bias": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    assert "not a readable safetensors file" in refusal(path, base)


def test_zip_bombs(base, tmp_path):
    """Compressed records, which PyTorch never writes, and records that lie over each other."""
    path = tmp_path / "compressed.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * (64 << 20))
    tracemalloc.start()
    message = refusal(path, base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "unpacks to 67,108,864 bytes" in message and "as a zip bomb does" in message
    assert peak < 8 << 20

    path = tmp_path / "overlapping.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\0" * 10_000)
        for i in range(50):  # the directory names one record fifty times
            entry = zipfile.ZipInfo(f"x/data/{i}")
            entry.file_size = entry.compress_size = 10_000
            entry.CRC = 0
            entry.header_offset = archive.infolist()[0].header_offset
            archive.filelist.append(entry)
    assert "as a zip bomb does" in refusal(path, base)


def test_tensors_larger_than_what_is_stored(base, tmp_path):
    """A stride of zero makes a terabyte out of one number."""
    torch.save({"conv_in.bias": torch.ones(1).expand(1 << 40)}, tmp_path / "x.pt")
    assert "larger than the data in the file" in refusal(tmp_path / "x.pt", base)
    torch.save({"conv_in.bias": torch.ones(4).to_sparse()}, tmp_path / "y.pt")
    assert "sparse" in refusal(tmp_path / "y.pt", base)


class Callback:
    """Stands for what training code leaves in its checkpoints."""


def test_a_checkpoint_that_needs_more_says_what(state, base, tmp_path):
    """Some .ckpt files hold the trainer's objects beside the weights: refused by name, with no advice to trust them."""
    module = type(sys)("trainer_callbacks")
    module.Callback, Callback.__module__, Callback.__qualname__ = Callback, "trainer_callbacks", "Callback"
    sys.modules["trainer_callbacks"] = module
    try:
        tensors = {key: torch.tensor(value) for key, value in state.items()}
        torch.save({"state_dict": tensors, "callbacks": Callback()}, tmp_path / "x.ckpt")
    finally:
        del sys.modules["trainer_callbacks"]
    message = refusal(tmp_path / "x.ckpt", base)
    assert "it needs trainer_callbacks.Callback" in message and "Use the .safetensors file" in message
    assert "weights_only=False" not in message and "\n" not in message


def test_tensors_beside_other_values_are_refused(state, base, tmp_path):
    torch.save({"conv_in.bias": torch.tensor(state["conv_in.bias"]), "step": 3}, tmp_path / "x.pt")
    assert "none are: step" in refusal(tmp_path / "x.pt", base)
