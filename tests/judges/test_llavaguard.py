"""LlavaGuard's ONNX path against transformers, token by token, on a tiny random LLaVA-OneVision."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert.graphs.export import main
from convert.graphs.llavaguard import PROMPT, export_llavaguard
from judges import agreement
from judges.llavaguard import LlavaGuard, policies
from judges.llavaguard import short_policy as short_policy_command
from judges.llavaguard.anyres import Geometry, best_grid, views
from judges.llavaguard.rating import FORCED, TO_CATEGORY, parse_reply
from judges.opening import open_safety
from judges.session import JudgeError
from tests import random_llava
from tests.judges import llavaguard_modes

SIDE, PATCH = 42, 14
GRIDS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4)]
POLICY = "Rate the picture. Prohibited are weapons: {guns, knives}.\nPermitted are cats."
SIZES = [(84, 84), (60, 100), (130, 40), (168, 150)]  # square, landscape, portrait, and one whose features shrink


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory in transformers' layout: tiny random weights with grouped queries, tokenizer, preprocessor config."""
    directory = tmp_path_factory.mktemp("llava")
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    text = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2,
    }  # fmt: skip
    random_llava.save(directory, POLICY, vision, text, grids=GRIDS)
    return directory


def processor():
    """transformers' image processor for the tiny model."""
    return random_llava.processor(SIDE, GRIDS)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx")
    assert max(item.error for item in export_llavaguard(source, out)) < 1e-4
    return out


@pytest.fixture(scope="module")
def model(source):
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        source, attn_implementation="eager", dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # go on past the end token, so that every step can be compared
    return model


def pictures(size, count=2):
    rng = np.random.default_rng(sum(size))
    return rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)


def reference_features(model, images, view):
    """transformers' image tokens [N, K, D]: anyres for an image alone, one view and a newline among several."""
    if view == "anyres":
        inputs = processor()(list(images), return_tensors="pt")
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
        output = model.model.get_image_features(pixel_values=pixels, image_sizes=sizes)
    else:
        base = np.stack([views(image, Geometry(SIDE, SIDE // PATCH, ()), "base")[0] for image in images])
        pixels = torch.from_numpy(base).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = torch.cat([pixels, pixels[:1]])[:, None]  # transformers takes one view each only of several images
        sizes = torch.tensor([[SIDE, SIDE]] * len(pixels))
        counts = torch.tensor([len(pixels)])
        output = model.model.get_image_features(pixel_values=pixels, image_sizes=sizes, batch_num_images=counts)
    return torch.stack(output.pooler_output[: len(images)])


def reference_generate(source, model, images, view, forced, tokens):
    """transformers: logits [N, tokens, vocabulary] and ids of `tokens` greedy steps after the prompt and `forced`."""
    features = reference_features(model, images, view)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    text = PROMPT.replace("{policy}", POLICY).replace("<image>", "<image>" * features.shape[1]) + forced
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.expand(len(images), -1)
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[ids == model.config.image_token_id] = features.reshape(-1, features.shape[-1])
    output = model.generate(
        inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(output.logits, 1).numpy(), output.sequences.numpy()


@pytest.mark.parametrize("size", SIZES)
def test_views_equal_transformers(size):
    images = pictures(size)
    geometry = Geometry(SIDE, SIDE // PATCH, tuple(map(tuple, GRIDS)))
    expected = processor()(list(images), return_tensors="np")["pixel_values"]
    for image, pixels in zip(images, expected, strict=True):
        assert np.abs(views(image, geometry, "anyres").transpose(0, 3, 1, 2) / 127.5 - 1 - pixels).max() < 1e-6


def test_grids_equal_transformers():
    from transformers.image_processing_utils import select_best_resolution

    grids = transformers.LlavaOnevisionConfig().image_grid_pinpoints
    for size in [(512, 512), (1024, 768), (300, 2000), (384, 384), (777, 1003), (2304, 100), (64, 64)]:
        assert best_grid(*size, tuple(map(tuple, grids))) == tuple(select_best_resolution(size, grids))


@pytest.mark.parametrize("view", ["base", "anyres"])
@pytest.mark.parametrize("size", SIZES)
def test_image_tokens_equal_transformers(source, exported, model, size, view):
    judge = LlavaGuard.open(exported, policy=source / "policy.txt", view=view)
    images = pictures(size)
    with torch.no_grad():
        expected = reference_features(model, images, view).numpy()
    found = np.stack(judge.image_tokens(images))
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("view", ["base", "anyres"])
@pytest.mark.parametrize("forced", ["", FORCED])
def test_logits_equal_transformers_token_by_token(source, exported, model, view, forced):
    judge = LlavaGuard.open(exported, policy=source / "policy.txt", view=view)
    images = pictures((60, 100))
    expected, tokens = reference_generate(source, model, images, view, forced, 12)
    step = judge.decoder.step(judge.context(images, judge.prompt.forced if forced else ()))
    for i in range(12):
        assert np.abs(step.logits - expected[:, i]).max() < 1e-4
        assert np.array_equal(step.logits.argmax(1), tokens[:, i])
        step = judge.decoder.step(judge.embed(tokens[:, i : i + 1]), step)


@pytest.mark.parametrize("view", ["base", "anyres"])
def test_verdict_is_the_rating_tokens_choice(source, exported, model, view):
    images = pictures((84, 84), 5)
    judge = LlavaGuard.open(exported, policy=source / "policy.txt", view=view, min_mass=0, batch_size=2)
    logits = reference_generate(source, model, images, view, FORCED, 1)[0][:, 0].astype(np.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    pair = logits[:, [tokenizer.convert_tokens_to_ids(word) for word in ("Safe", "Unsafe")]]
    expected = np.exp(pair[:, 1]) / np.exp(pair).sum(1)
    records = judge(images)
    assert np.abs([r.score for r in records] - expected).max() < 1e-4
    assert [r.verdict for r in records] == ["unsafe" if p > 0.5 else "safe" for p in expected]
    mass = np.exp(pair - logits.max(1, keepdims=True)).sum(1) / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    assert np.allclose([r.rating_mass for r in records], mass, rtol=1e-3)
    closed = LlavaGuard.open(exported, policy=source / "policy.txt", view=view, min_mass=1.0)(images)
    assert {r.verdict for r in closed} == {"undecided"} and "rating tokens" in closed[0].reason


def test_category_is_the_forced_continuation(source, exported, model):
    images = pictures((60, 100))
    judge = LlavaGuard.open(exported, policy=source / "policy.txt", min_mass=0, category=True, batch_size=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for record, image in zip(judge(images), images, strict=True):
        forced = FORCED + {"safe": "Safe", "unsafe": "Unsafe"}[record.verdict] + TO_CATEGORY
        tokens = reference_generate(source, model, image[None], "anyres", forced, 24)[1][0].tolist()
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        kept = tokens[: tokens.index(end)] if end in tokens else tokens
        assert record.category == tokenizer.decode(kept, skip_special_tokens=True).split('"')[0]


def test_generate_mode_reads_the_same_reply(source, exported, model):
    images = pictures((84, 84))
    judge = LlavaGuard.open(exported, policy=source / "policy.txt", mode="generate", batch_size=2)
    tokens = reference_generate(source, model, images, "anyres", "", 200)[1]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for record, row in zip(judge(images), tokens.tolist(), strict=True):
        kept = row[: row.index(end)] if end in row else row
        assert record.reply[:200] == tokenizer.decode(kept, skip_special_tokens=True)[:200]
        assert record.verdict == parse_reply(record.reply).verdict
        json.dumps(record.as_dict(), allow_nan=False)


def test_float16_graphs(source, exported, tmp_path):
    main(["--kind", "llavaguard", str(source), "--out", str(tmp_path), "--dtype", "float16"])
    assert json.loads((tmp_path / "llavaguard.json").read_text())["prompt"] == PROMPT
    images = pictures((84, 84))
    full, half = (LlavaGuard.open(out, policy=source / "policy.txt", min_mass=0) for out in (exported, tmp_path))
    assert np.allclose([r.score for r in full(images)], [r.score for r in half(images)], atol=0.05)


@pytest.mark.parametrize(
    ("text", "verdict", "category"),
    [
        (
            '{\n    "rating": "Unsafe",\n    "category": "O2: Violence",\n    "rationale": "a } brace"\n}',
            "unsafe",
            "O2: Violence",
        ),
        ('```json\n{"rating": "Safe", "category": "NA: None applying"}\n```', "safe", "NA: None applying"),
        ("{'rating': 'Unsafe', 'category': 'O3'}", "unsafe", "O3"),
        ('{"rating": "Maybe"}', "undecided", ""),
        ("The picture is Unsafe.", "unsafe", ""),
        ("Safe", "safe", ""),
        ("Safe or Unsafe?", "undecided", ""),
        ("", "undecided", ""),
        ('{"rating": "Unsafe", "category": "O2', "unsafe", ""),
        ('{"rating": "Safe", "category": "NA: None applying", "rationale": "Nothing Unsafe is', "safe", ""),
        ('{"rating": "Unsafe", "category": "O2", "rationale": "Safe for adults, but', "unsafe", ""),
        ('{"rating": "Safe", "rating": "Unsafe", "rationale": "cut', "undecided", ""),
        ('{"rating": "Unsafe"|"Safe", "category": "O1', "undecided", ""),  # the question repeated, no answer
    ],
)
def test_replies(text, verdict, category):
    assert parse_reply(text)[:2] == (verdict, category)


def test_bad_input_is_named(source, exported, tmp_path):
    with pytest.raises(JudgeError, match="no such policy file"):
        LlavaGuard.open(exported, policy=tmp_path / "no.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(JudgeError, match="the policy is empty"):
        LlavaGuard.open(exported, policy=tmp_path / "empty.txt")
    (tmp_path / "image.txt").write_text("look at <image>")
    with pytest.raises(JudgeError, match="stands for the image"):
        LlavaGuard.open(exported, policy=tmp_path / "image.txt")
    with pytest.raises(JudgeError, match=r"llavaguard\.json: no such file"):
        LlavaGuard.open(tmp_path, policy=source / "policy.txt")
    with pytest.raises(JudgeError, match=r"no vision_encoder_q4\.onnx, embed_tokens_q4\.onnx"):
        LlavaGuard.open(exported, policy=source / "policy.txt", variant="_q4")
    with pytest.raises(ValueError, match="'tiles'"):
        LlavaGuard.open(exported, policy=source / "policy.txt", view="tiles")


SHORT = "\nRate it.\nO1: Hate\n"  # stands for the published text, which is the authors'


@pytest.fixture
def short_policy(exported, tmp_path, monkeypatch):
    """The exported graphs with a short policy that counts as the published one."""
    monkeypatch.setattr(policies, "SHORT_SHA256", policies.sha256(SHORT))
    shutil.copytree(exported, tmp_path / "graphs")
    (tmp_path / "robustness.py").write_text(f"import nothing_that_exists\nLLAVAGUARD_POLICY = {SHORT!r}\nX = 1\n")
    assert short_policy_command.main([str(tmp_path / "robustness.py"), str(tmp_path / "graphs")]) == 0
    return tmp_path / "graphs"


def test_the_short_policy_is_sent_to_the_letter(short_policy):
    judge = LlavaGuard.open(short_policy, policy="short", mode="generate")
    sent = judge.tokenizer.decode([*judge.prompt.before, *judge.prompt.after], skip_special_tokens=False)
    assert sent == PROMPT.replace("<image>", "").replace("{policy}", SHORT)
    assert judge.identity["policy"] == "short" and judge.identity["policy_sha256"] == policies.SHORT_SHA256
    named = open_safety(f"llavaguard:{short_policy}?policy=short&mode=generate&view=base")
    assert named.prompt == judge.prompt and (named.rating.mode, named.rating.view) == ("generate", "base")


def test_another_text_is_not_the_short_policy(short_policy, exported, tmp_path, capsys):
    (short_policy / "short_policy.txt").write_text(SHORT.strip())
    with pytest.raises(JudgeError, match="not the benchmark's short policy to the letter"):
        LlavaGuard.open(short_policy, policy="short")
    with pytest.raises(JudgeError, match=r"short_policy\.txt: no such file; write it with `python -m"):
        LlavaGuard.open(exported, policy="short")
    for content, words in (
        ("LLAVAGUARD_POLICY = 'other'", "is not the published one"),
        ("POLICY = ''", "expected one text LLAVAGUARD_POLICY, found 0"),
        ("<html>", "not a Python file"),
    ):
        (tmp_path / "other.py").write_text(content)
        assert short_policy_command.main([str(tmp_path / "other.py"), str(tmp_path)]) == 1
        assert words in capsys.readouterr().err


def test_the_policy_of_titles_is_built_in(exported):
    judge = LlavaGuard.open(exported, policy="titles")
    assert judge.identity["policy"] == "titles" and len(policies.CATEGORIES) == 9
    text = policies.open_policy("titles", exported).text
    assert all(title in text for title in (*policies.CATEGORIES, "NA: None applying", '"rating"'))
    assert judge.identity["policy_sha256"] == policies.sha256(text) != policies.SHORT_SHA256


def test_agreement_of_prefill_and_generation(source, exported, tmp_path, capsys):
    for i, image in enumerate([*pictures((60, 100)), *pictures((84, 84))]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    shutil.copytree(exported, graphs := tmp_path / "graphs")
    shutil.copy(source / "policy.txt", graphs)
    judges = [f"llavaguard:{graphs}?mode=prefill", f"llavaguard:{graphs}?mode=generate"]
    assert agreement.main([str(tmp_path), "--judges", *judges, "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["images"] == 4 and list(result["judges"]) == judges
    seconds = [result["judges"][judge]["median_seconds"] for judge in judges]
    assert seconds[0] < seconds[1]
    assert [result["judges"][judge]["identity"]["options"]["mode"] for judge in judges] == ["prefill", "generate"]
    capsys.readouterr()
    assert agreement.main([str(tmp_path / "none"), "--judges", *judges]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_replies_of_a_random_model_are_all_undecided(tmp_path):
    """Noise instead of a reply never counts as safe, in either mode."""
    result = llavaguard_modes.compared(0, 4, tmp_path)
    assert [counts["undecided"] for counts in result["judges"].values()] == [4, 4]


@pytest.mark.slow
def test_prefill_agrees_with_the_generated_reply_of_a_model_that_can_answer(tmp_path):
    pair = llavaguard_modes.compared(300, 100, tmp_path)["pairs"][0]
    assert pair["decided_by_both"] > 90 and pair["agreement"] > 0.95 and 10 < pair["both_unsafe"] < 90
