"""LlavaGuard's verdict from one prefill, from a whole reply, and from transformers' generate: same images, one run.

    python -m benchmarks.llavaguard_speed [--view base] [--size tiny] [--dtype float16 --device cuda]

Random weights in the layout and at the size of LlavaGuard 0.5B (`--size tiny`: too small to measure anything). A random
model never ends its reply, so replies have their greatest length, 200 tokens, and the ratio is an upper bound; the last
row says what half of them take. `python -m judges.agreement` measures your weights on your images.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import side_by_side
from benchmarks.judges_speed import photographs
from benchmarks.side_by_side import Measured, Prepared, Side

POLICY = "Rate the picture. " + "Prohibited are weapons, violence and hatred; permitted are cats. " * 12
SIZES = {
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6},
    ),
    "0.5B": (
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16},
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    ),
}
VISION = {"image_size": 384, "patch_size": 14}
TEXT = {"num_key_value_heads": 2, "vocab_size": 152000, "tie_word_embeddings": True, "rope_theta": 1e6}


def write_models(size: str, dtype: str, folder: Path) -> tuple[Path, Path]:
    """(transformers' directory, the judge's graphs) of a random model."""
    from convert.graphs.llavaguard import export_llavaguard
    from tests import random_llava

    vision, text = SIZES[size]
    source, graphs = folder / "transformers", folder / "graphs"
    source.mkdir()
    random_llava.save(source, POLICY, vision | VISION, text | TEXT, end=False)
    export_llavaguard(source, graphs, dtype=dtype)
    return source, graphs


def ours(graphs: Path, policy: Path, mode: str, view: str, device: str) -> Prepared:
    """The judge in one of its modes, one image at a time."""
    from judges.llavaguard import LlavaGuard

    start = time.perf_counter()
    judge = LlavaGuard.open(graphs, policy=policy, mode=mode, view=view, min_mass=0, providers=device)
    loading = time.perf_counter() - start
    images = photographs(1)

    judged = judge.rate if mode == "prefill" else judge.read  # errors raised, where a call makes them undecided
    return Prepared({"picture": lambda: judged(images)[0].verdict}, {"loading": loading})


def theirs(source: Path, view: str, dtype: str, device: str, tokens: int) -> Prepared:
    """transformers' processor and `generate`, greedy, one image at a time."""
    import torch
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    from convert.graphs.llavaguard import PROMPT
    from judges.llavaguard.anyres import Geometry, views
    from tests import random_llava

    start = time.perf_counter()
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(source, dtype=getattr(torch, dtype))
    model = model.eval().to(device)
    loading = time.perf_counter() - start
    tokenizer, processor = AutoTokenizer.from_pretrained(source), random_llava.processor(VISION["image_size"])
    image, side = photographs(1)[0], VISION["image_size"]
    if view == "base":  # the squeezed image alone
        image = views(image, Geometry(side, side // VISION["patch_size"], ()), "base")[0]

    @torch.no_grad()
    def reply() -> int:
        """Tokens written."""
        pixels = processor([image], return_tensors="pt").to(device)
        values, sizes = pixels["pixel_values"].to(model.dtype), pixels["image_sizes"]
        if view == "base":  # transformers tiles an image that is alone
            states = model.model.vision_tower(values[0, :1], output_hidden_states=True).hidden_states[-1]
            features = torch.cat([model.model.multi_modal_projector(states)[0], model.model.image_newline[None]])
        else:
            features = model.model.get_image_features(pixel_values=values, image_sizes=sizes).pooler_output[0]
        text = PROMPT.replace("{policy}", POLICY).replace("<image>", "<image>" * len(features))
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[ids == model.config.image_token_id] = features
        written = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        return written.shape[1]

    return Prepared({"picture": reply}, {"loading": loading})


def rows(found: Measured, tokens: int) -> list[dict[str, object]]:
    """Median seconds an image of each side, tokens written, and how many times one prefill's that is."""
    turns = {side: seconds["picture"] for side, seconds in found.seconds.items()}
    written = {"prefill": 0, "generate": tokens, "transformers": found.values["transformers"]["picture"]}
    half = f"generate, {tokens // 2} tokens, from its parts"
    turns[half] = [(a + b) / 2 for a, b in zip(turns["prefill"], turns["generate"], strict=True)]
    return [
        {
            "": side,
            "seconds": float(np.median(seconds)),
            "tokens": written.get(side, tokens // 2),
            "times one prefill": side_by_side.ratio(seconds, turns["prefill"]),
            "peak GiB": found.peak.get(side, ""),
        }
        for side, seconds in turns.items()
    ]


def main() -> None:
    from judges.llavaguard import REPLY_TOKENS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5B")
    parser.add_argument("--view", choices=("base", "anyres"), default="anyres")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, graphs = write_models(flags.size, flags.dtype, Path(folder))
        policy, options = source / "policy.txt", (flags.view, flags.device)
        contestants = {mode: Side(ours, (graphs, policy, mode, *options)) for mode in ("prefill", "generate")}
        contestants["transformers"] = Side(theirs, (source, flags.view, flags.dtype, flags.device, REPLY_TOKENS))
        found = side_by_side.race(contestants, ["picture"], rounds=flags.rounds, starts=1, apart=True)
    title = f"LlavaGuard {flags.size}, view {flags.view}, random weights"
    side_by_side.print_report(title, {"One picture": rows(found, REPLY_TOKENS)})


if __name__ == "__main__":
    main()
