"""Exported judges against PyTorch and transformers, on tiny random models."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image
from safetensors.torch import save_file

from convert.graphs.export import (
    SmallConvNet,
    cached_torchscript,
    export_clip,
    export_q16,
    export_small_conv_net,
    export_torchscript,
    main,
)
from judges.classifier import Classifier
from judges.clip_score import CLIPScore
from judges.inception import Inception
from judges.q16 import Q16
from judges.session import JudgeError, open_session

LABELS = ["cat", "dog", "gun", "knife"]
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def pm1(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1], written independently of judges.preprocess."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    net = SmallConvNet(len(LABELS)).eval()
    with torch.no_grad():
        net.head.weight.mul_(20)  # logits far enough apart that the probabilities are no four quarters
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_file(net.state_dict(), path)
    return net, path


def test_small_conv_net_names_and_shapes():
    shapes = {name: list(value.shape) for name, value in SmallConvNet(4).state_dict().items()}
    assert shapes["convs.0.weight"] == [32, 3, 3, 3] and shapes["convs.5.weight"] == [128, 128, 3, 3]
    assert shapes["norms.3.weight"] == [64] and shapes["head.weight"] == [4, 128] and len(shapes) == 26


def test_classifier_equals_torch(trained, tmp_path):
    net, path = trained
    exported = export_small_conv_net(path, LABELS, tmp_path, unsafe=["gun", "knife"], threshold=0.4)
    assert exported.error < 1e-4
    with torch.no_grad():
        expected = net(pm1(PICTURES)).softmax(-1).numpy()
    judge = Classifier.open(exported.path, batch_size=2)
    records = judge(PICTURES)
    assert np.allclose([r.score for r in records], expected[:, 2:].sum(1), atol=1e-4)
    assert [r.verdict for r in records] == ["unsafe" if p >= 0.4 else "safe" for p in expected[:, 2:].sum(1)]
    assert {r.verdict for r in Classifier.open(exported.path, threshold=0.0)(PICTURES)} == {"unsafe"}
    top = LABELS[int(expected[0].argmax())]
    assert records[0].labels[top] == pytest.approx(expected[0].max(), abs=1e-4)
    assert judge.identity["options"]["unsafe"] == ["gun", "knife"] and len(judge.identity["sha256"]) == 64
    json.dumps([r.as_dict() for r in records], allow_nan=False)


def test_native_features_equal_torch(trained, tmp_path):
    net, path = trained
    exported = export_small_conv_net(path, LABELS, tmp_path, features=True)
    network = Inception.open(exported.path, batch_size=3)
    with torch.no_grad():
        expected = net.features(pm1(PICTURES)).numpy()
    assert network.mode == "native" and network.dimension == 128
    assert np.abs(network(PICTURES) - expected).max() < 1e-4
    assert network(PICTURES[:0]).shape == (0, 128)


def test_torchscript_file_is_converted_once(trained, tmp_path):
    net, _ = trained
    torch.jit.trace(net, torch.zeros(1, 3, 32, 32)).save(str(tmp_path / "judge.ts"))
    sidecar = {
        "labels": LABELS,
        "unsafe": ["gun"],
        "threshold": 0.5,
        "input": {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    graph = cached_torchscript(tmp_path / "judge.ts", sidecar, tmp_path / "cache")
    written = graph.stat().st_mtime_ns
    assert cached_torchscript(tmp_path / "judge.ts", sidecar, tmp_path / "cache").stat().st_mtime_ns == written
    with torch.no_grad():
        expected = net(pm1(PICTURES)).softmax(-1)[:, 2].numpy()
    assert np.allclose([r.score for r in Classifier.open(graph)(PICTURES)], expected, atol=1e-4)
    (tmp_path / "judge.json").write_text(json.dumps(sidecar))
    main(
        [
            "--kind",
            "torchscript",
            str(tmp_path / "judge.ts"),
            "--out",
            str(tmp_path / "o"),
            "--sidecar",
            str(tmp_path / "judge.json"),
        ]
    )
    assert json.loads((tmp_path / "o" / "judge.json").read_text())["source"]["file"] == "judge.ts"


def test_a_state_dict_is_no_torchscript(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: not a TorchScript file"):
        export_torchscript(tmp_path / "weights.pt", torch.zeros(1, 3, 8, 8), tmp_path / "o.onnx", {})


def test_a_graph_that_differs_from_torch_is_not_written(tmp_path):
    class Frozen(torch.nn.Module):
        def forward(self, x):
            return x.reshape(int(x.shape[0]), -1)  # tracing bakes the example's batch size in

    with pytest.raises(ValueError, match="no graph was written"):
        export_torchscript(Frozen(), torch.zeros(2, 3, 4, 4), tmp_path / "o.onnx", {})
    assert not list(tmp_path.glob("o.*"))


def clip_directory(path, eos_token_id: int):
    """A tiny random CLIPModel with a byte-pair vocabulary of single letters and a few merges."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = letters + [c + "</w>" for c in letters] + ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(
        text_config=tower
        | {
            "vocab_size": len(vocab),
            "max_position_embeddings": 12,
            "eos_token_id": eos_token_id,
            "bos_token_id": len(vocab) - 2,
        },
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.CLIPModel(config).eval().save_pretrained(path)
    transformers.CLIPTokenizer(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt")).save_pretrained(path)
    return path


TEXTS = ["cat", "a cat!", "a cat", "cat", "a very long text about a cat and a dog"]


@pytest.mark.parametrize("legacy", [True, False])
def test_clip_score_equals_transformers(legacy, tmp_path):
    directory = clip_directory(tmp_path / "clip", 2 if legacy else 191)
    exported = export_clip(directory, tmp_path / "out")
    assert max(item.error for item in exported) < 1e-4
    model = transformers.CLIPModel.from_pretrained(directory)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    scorer = CLIPScore.open(tmp_path / "out", batch_size=2)
    assert np.array_equal(scorer.tokenize(TEXTS).ids, ids.numpy())
    pixels = torch.from_numpy(clip_pixels(PICTURES))
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
        expected = (output.image_embeds * output.text_embeds).sum(-1).numpy()
    records = scorer.score(PICTURES, TEXTS)
    assert np.allclose([r.score for r in records], expected, atol=1e-5)
    assert [r.truncated for r in records] == [False] * 4 + [True]
    with pytest.raises(ValueError, match="4 texts and 5 images"):
        scorer.score(PICTURES, TEXTS[:4])


def clip_pixels(images: np.ndarray) -> np.ndarray:
    """CLIP's normalisation of images that already have the right size, in float64, as a reference."""
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return ((images / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def test_clip_preprocessing_equals_transformers(tmp_path):
    from judges.preprocess import InputSpec, prepare

    photo = Image.fromarray(RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize(
        (301, 400), Image.Resampling.BICUBIC
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    expected = np.asarray(processor(photo, return_tensors="np")["pixel_values"])
    spec = InputSpec((64, 64), "clip", tuple(processor.image_mean), tuple(processor.image_std))
    assert np.abs(prepare(np.asarray(photo)[None], spec) - expected).max() < 1e-5


def test_q16_equals_the_formula_on_torch_embeddings(tmp_path):
    import pickle

    directory = clip_directory(tmp_path / "clip", 191)
    prompts = RNG.normal(size=(2, 16)).astype(np.float16)
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(prompts))
    source, prompts_file, out = (str(tmp_path / name) for name in ("clip", "prompts.p", "q16"))
    main(["--kind", "q16", source, "--prompts", prompts_file, "--out", out, "--model", "tiny"])
    model = transformers.CLIPModel.from_pretrained(directory)
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=torch.from_numpy(clip_pixels(PICTURES))).pooler_output
        image = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
        text = torch.nn.functional.normalize(torch.from_numpy(prompts).float(), dim=-1)
        expected = (100 * image @ text.T).softmax(-1).numpy()
    judge = Q16.open(out)
    assert judge.identity["model"] == "tiny"
    records = judge(PICTURES)
    assert np.allclose([r.score for r in records], expected[:, 1], atol=1e-4)
    assert [r.verdict for r in records] == ["unsafe" if p > 0.5 else "safe" for p in expected[:, 1]]
    wrong = tmp_path / "wrong.p"
    wrong.write_bytes(pickle.dumps(prompts[:, :8]))
    with pytest.raises(ValueError, match="do not fit"):
        export_q16(directory, wrong, tmp_path / "no")


@pytest.mark.parametrize(
    ("kind", "words"), [("clip", "expected a local transformers directory"), ("q16", "not Q16 prompts")]
)
def test_the_command_refuses_a_wrong_source_in_one_line(kind, words, tmp_path, capsys):
    if kind == "q16":
        clip_directory(tmp_path / "clip", 191)
    (tmp_path / "clip").mkdir(exist_ok=True)
    (tmp_path / "prompts.p").write_bytes(b"junk")
    source, prompts, out = (str(tmp_path / name) for name in ("clip", "prompts.p", "out"))
    with pytest.raises(SystemExit) as stopped:
        main(["--kind", kind, source, "--prompts", prompts, "--out", out])
    assert stopped.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_missing_external_data_is_named(trained, tmp_path):
    import onnx

    exported = export_small_conv_net(trained[1], LABELS, tmp_path, unsafe=["gun"])
    graph = onnx.load(exported.path)
    onnx.save(graph, tmp_path / "big.onnx", save_as_external_data=True, location="big.onnx_data", size_threshold=0)
    assert "big.onnx_data" in open_session(tmp_path / "big.onnx").identity()["external_sha256"]
    (tmp_path / "big.onnx_data").unlink()
    with pytest.raises(JudgeError, match=r"big\.onnx: its external data file is missing"):
        open_session(tmp_path / "big.onnx")
