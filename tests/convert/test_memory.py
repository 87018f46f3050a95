"""Resident memory while flow transformers of some 300 MB are loaded, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("torch")

from convert import bfl, mmdit, rename
from convert.diffusers_dir import save_weights
from convert.tensors import MAPPED_BYTES, Shards
from spqr_jax import backbones
from spqr_jax.params import flatten, unflatten
from tests import flow_reference, flux_reference

pytestmark = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts this memory")
SHARD = 100_000_000  # bytes, at most
HEADS, DEPTH = 12, 64
SIZES = {
    "flux": {"num_attention_heads": HEADS, "attention_head_dim": DEPTH, "axes_dims_rope": (16, 24, 24)},
    "sd3": {"num_attention_heads": HEADS, "attention_head_dim": DEPTH, "caption_projection_dim": HEADS * DEPTH},
}
ORIGINALS = {"flux": bfl.originals, "sd3": mmdit.originals}

# Prints the bytes that are resident beside what was before: at the highest, and in the end.
CHILD = """
import json, sys
import convert
from spqr_jax import params

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

small, source, shapes_of = sys.argv[1:4]
first = convert.load(small)
base = None
if shapes_of:
    from spqr_jax import backbones
    config = json.load(open(shapes_of))
    definition, shapes = backbones.define("transformer", config)
    definitions = {**first.definitions, "transformer": definition}
    base = first._replace(definitions=definitions, configs={**first.configs, "transformer": config})
    base = base.with_params(transformer=shapes)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
loaded = convert.load(source, base=base)
peak = resident("VmHWM") - before
print(json.dumps({"peak": peak, "weights": params.nbytes(loaded.params["transformer"])}))
"""


@pytest.fixture(scope="module", params=SIZES)
def large(request, tmp_path_factory):
    """(kind, small directory, directory with a large transformer in shards, its single file, bytes of the largest
    shard)."""
    kind, folder = request.param, tmp_path_factory.mktemp("large")
    pipe = flux_reference.pipeline("dev") if kind == "flux" else flow_reference.sd3("sd3")
    small, directory = folder / "small", folder / "directory"
    for place in (small, directory):
        pipe.save_pretrained(place)
    config = json.loads((small / "transformer" / "config.json").read_text()) | SIZES[kind]
    config |= {"num_layers": 2, "num_single_layers": 4} if kind == "flux" else {"num_layers": 4}
    for path in (directory / "transformer").iterdir():
        path.unlink()
    (directory / "transformer" / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = flatten(backbones.define("transformer", config)[1])
    params = {path: rng.random(leaf.shape, np.float32) for path, leaf in shapes.items()}
    save_weights(unflatten(params), directory / "transformer", "diffusion_pytorch_model", limit=SHARD)
    save_file(original(params, kind), folder / "single.safetensors")
    shards = sorted((directory / "transformer").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert len(shards) >= 4
    return kind, small, directory, folder / "single.safetensors", shards[-1].stat().st_size


def original(params, kind):
    """A transformer's weights in the shapes and under the names of the original code; the numbers do not matter."""
    ours = {rename.torch_name(path): rename.to_torch(path, leaf) for path, leaf in params.items()}
    layers = dict.fromkeys(key.rpartition(".")[0] for key in ours) | dict.fromkeys(ours)
    found = {}
    for layer, parts in ORIGINALS[kind](layers).items():
        for leaf in ("weight", "bias", ""):
            names = [f"{part}.{leaf}".rstrip(".") for part, _ in parts]
            if all(name in ours for name in names):
                ending = "scale" if layer.endswith(("query_norm", "key_norm")) else leaf
                found[f"model.diffusion_model.{layer}.{ending}".rstrip(".")] = np.concatenate([ours[n] for n in names])
    return found


def measured(small, source, config="") -> dict[str, int]:
    command = [sys.executable, "-c", CHILD, str(small), str(source), str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(kind: str, form: str, found: dict[str, int], shard: int) -> None:
    beside = found["peak"] - found["weights"]
    print(f"{kind}, {form}: weights {found['weights']:,} bytes, beside them {beside:,}; largest shard {shard:,}")
    assert found["weights"] > 250_000_000 and beside <= shard


@pytest.mark.slow
def test_a_directory_takes_no_more_than_a_shard_beside_the_weights(large):
    kind, small, directory, _, shard = large
    check(kind, "directory", measured(small, directory), shard)


@pytest.mark.slow
def test_a_single_file_takes_no_more_than_a_shard_beside_the_weights(large):
    kind, small, directory, single, shard = large
    check(kind, "single file", measured(small, single, directory / "transformer" / "config.json"), shard)


def test_files_that_were_read_are_given_back(tmp_path):
    """Of two shards that are read in turn, pages of the last one alone are resident; of a long one, the last part."""
    size = 1 << 20
    state = {f"{number:02}": np.ones(size // 4, np.float32) for number in range(24)}
    save_file({key: state[key] for key in state if key < "20"}, tmp_path / "long.safetensors")
    save_file({key: state[key] for key in state if key >= "20"}, tmp_path / "short.safetensors")
    where = {key: "long.safetensors" if key < "20" else "short.safetensors" for key in state}
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": where}))
    shards = Shards(tmp_path / "index.json")
    for key in list(state)[:20]:
        assert (shards[key] == 1).all()
        assert resident(tmp_path / "long.safetensors") <= MAPPED_BYTES + 2 * size
    assert resident(tmp_path / "long.safetensors") >= size  # so that this measures something
    assert (shards["20"] == 1).all()
    assert resident(tmp_path / "long.safetensors") < size <= resident(tmp_path / "short.safetensors")


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total
