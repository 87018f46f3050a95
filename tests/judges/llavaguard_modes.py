"""Measures how well LlavaGuard's one prefill agrees with its generated reply, on small models of the tests.

    python -m tests.judges.llavaguard_modes [--images 400] [--steps 300]

Two models without LlavaGuard's weights: one random, whose replies are noise; and the same one after it has been taught,
in some seconds, to answer grey noise with LlavaGuard's JSON: Unsafe the more probably, the brighter the image.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from convert.graphs.llavaguard import PROMPT, export_llavaguard
from judges import agreement
from judges.llavaguard.rating import FORCED, TO_CATEGORY
from judges.opening import open_safety
from tests import random_llava

SIDE = 42
POLICY = "Rate the image. Prohibited is light."
CATEGORIES = {"Safe": "NA: None applying", "Unsafe": "O1: Light"}


def save_random(directory: Path) -> None:
    """A random model of 42 x 42 pixels, 9 tokens a view, in `directory`."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": 14,
    }  # fmt: skip
    text = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 1024,
    }  # fmt: skip
    random_llava.save(directory, POLICY, vision, text, grids=[[SIDE, SIDE]])


def images(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise around a grey uint8 [N, 42, 42, 3], and the greys float [N] in 0..1."""
    greys = rng.uniform(size=count)
    noise = rng.normal(greys[:, None, None, None] * 255, 30, (count, SIDE, SIDE, 3))
    return noise.clip(0, 255).astype(np.uint8), greys


def teach(directory: Path, steps: int) -> None:
    """Trains the model in `directory` to write the reply; the probability of Unsafe is the image's grey."""
    torch.manual_seed(1)
    model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = random_llava.processor(SIDE, [[SIDE, SIDE]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng = np.random.default_rng(1)
    image_tokens = 9 + 3 * (3 + 1)  # base view, then one tile whose three rows end in a newline
    prompt = PROMPT.replace("{policy}", POLICY).replace("<image>", "<image>" * image_tokens)
    length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    for _ in range(steps):
        pictures, greys = images(rng, 8)
        words = ["Unsafe" if unsafe else "Safe" for unsafe in rng.uniform(size=8) < greys]
        replies = [f'{FORCED}{word}{TO_CATEGORY}{CATEGORIES[word]}"\n}}<|im_end|>' for word in words]
        rows = tokenizer(
            [prompt + reply for reply in replies], return_tensors="pt", padding=True, padding_side="right",
            add_special_tokens=False,
        )  # fmt: skip
        labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
        labels[:, :length] = -100
        inputs = processor(list(pictures), return_tensors="pt")
        loss = model(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=labels,
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"],
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


def measure(source: Path, work: Path, count: int) -> dict:
    """The comparison of both modes of the model in `source` on `count` new images, see `judges.agreement`."""
    graphs, pictures = work / "graphs", work / "images"
    export_llavaguard(source, graphs)
    (graphs / "policy.txt").write_text(POLICY)
    pictures.mkdir()
    for i, image in enumerate(images(np.random.default_rng(2), count)[0]):
        Image.fromarray(image).save(pictures / f"{i:04}.png")
    sources = {mode: f"llavaguard:{graphs}?mode={mode}" for mode in ("prefill", "generate")}
    judges = {mode: open_safety(source) for mode, source in sources.items()}
    return agreement.compare(judges, agreement.image_paths([str(pictures)]))


def compared(steps: int, count: int, folder: Path) -> dict:
    """The comparison on a model taught for `steps` steps (0: random); its files go to `folder`."""
    (folder / "model").mkdir(parents=True)
    save_random(folder / "model")
    if steps:
        teach(folder / "model", steps)
    return measure(folder / "model", folder, count)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.judges.llavaguard_modes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    flags = parser.parse_args()
    for steps in (0, flags.steps):
        with tempfile.TemporaryDirectory() as folder:
            result = compared(steps, flags.images, Path(folder))
        print(f"after {steps} steps of training: {agreement.tables(result)}\n", flush=True)


if __name__ == "__main__":
    main()
