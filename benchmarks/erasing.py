"""Why methods fail in the emoji world: names that cannot be told apart, too much erased at once, or prompts too bare.

    python -m benchmarks.erasing

The edit is UCE's closed form, with its authors' settings: it has no training that could be cut short. Prompts are
drawn with seed 1. Those that runs score are drawn with seed 0, so no scored prompt is used. Each table answers one
question:

- names: how much of a harmful name's text state lies outside the states of the names that must survive;
- amounts: what is left when one object, one category, or all harmful objects are erased while the bare benign names
  are preserved; when the other harmful names are preserved too; when benign captions are, as the world's concepts have
  it; and when harmful captions are erased as well, as its configs have it;
- contexts: the same pictures asked for by the bare name, and by a prompt with style and background.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import convert
from spqr_jax import backbones, mini
from spqr_jax.concepts import Concept
from spqr_jax.config import Config
from spqr_jax.generate import generate
from spqr_jax.methods import uce
from spqr_jax.methods.tools.closed_form import text_states
from spqr_jax.mini import world
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import protocol
from spqr_jax.run.jury import Jury, open_jury
from spqr_jax.score.stats import wilson_interval

SEED = 1  # of the prompts; runs score those of seed 0
CATEGORY = "weapons"
SAMPLING = {"steps": 6, "guidance": 4.0, "scheduler": "dpmpp"}
BENIGN = tuple(world.BENIGN.values())
Array = NDArray[np.float64]


class Left(NamedTuple):
    """What a model still draws, one value an image: verdicts (1 unsafe) and CLIPScores."""

    erased: Array  # of prompts that name what was erased
    others: Array  # of the other harmful prompts
    flagged: Array  # of benign prompts
    clip_harmful: Array
    clip_benign: Array

    def cells(self) -> list[str]:
        """Means with 95% intervals: Wilson's for shares in percent, normal ones for CLIPScores."""
        return [*(_share(part) for part in self[:3]), *(_mean(part) for part in self[3:])]


def _share(unsafe: Array) -> str:
    if not len(unsafe):
        return ""
    low, high = wilson_interval(unsafe.sum(), len(unsafe))
    return f"{100 * unsafe.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean(values: Array) -> str:
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} [{values.mean() - half:.3f}, {values.mean() + half:.3f}]"


# The text space


def name_states(pipeline: Pipeline, names: Sequence[str]) -> Array:
    """The text state of each name at its last word, [N, d]."""
    last = [next(iter(backbones.of(pipeline).last_words(pipeline, name))) for name in names]
    return text_states(pipeline, names)[np.arange(len(names)), last]


def cosines(states: Array, centre: Array) -> Array:
    """Cosines [N, N] of states [N, d] around a centre [d]."""
    moved = states - centre
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return unit @ unit.T


def outside(states: Array, others: Array, centre: Array) -> Array:
    """Share [N] of each state's squared distance from the centre that lies outside the span of the others."""
    moved = states - centre
    basis = np.linalg.qr((others - centre).T)[0]
    rest = moved - moved @ basis @ basis.T
    return np.sum(rest**2, axis=1) / np.sum(moved**2, axis=1)


def names_table(pipeline: Pipeline) -> list[str]:
    """Lines of the table of names."""
    groups = [tuple(words.values()) for words in world.HARMFUL.values()]
    harmful = tuple(itertools.chain.from_iterable(groups))
    states = name_states(pipeline, (*harmful, *BENIGN))
    kind = np.array([i for i, group in enumerate(groups) for _ in group] + [-1] * len(BENIGN))
    centre, n = states.mean(axis=0), len(harmful)
    found, apart = cosines(states, centre), ~np.eye(len(states), dtype=bool)
    same, both = kind[:, None] == kind[None], (kind[:, None] >= 0) & (kind[None] >= 0)
    mixed = (kind[:, None] >= 0) & (kind[None] < 0)
    members = kind == list(world.HARMFUL).index(CATEGORY)
    spread = np.cumsum(np.linalg.svd(states - centre, compute_uv=False) ** 2)
    of_benign = outside(states[:n], states[n:], centre).mean()
    of_all_others = outside(states[members], states[~members], centre).mean()
    figures = {
        "dimensions of the text space": states.shape[1],
        "names, harmful of them": f"{len(states)}, {n}",
        "dimensions that hold 95% of the names' variance": int(np.argmax(spread >= 0.95 * spread[-1])) + 1,
        "mean cosine within a harmful category": f"{found[same & both & apart].mean():.2f}",
        "between harmful categories": f"{found[~same & both].mean():.2f}",
        "largest between harmful categories": f"{found[~same & both].max():.2f}",
        "harmful with benign, mean": f"{found[mixed].mean():.2f}",
        "harmful with the nearest benign name, mean": f"{found[:n, n:].max(axis=1).mean():.2f}",
        "share of a harmful name outside the span of the benign ones": f"{of_benign:.2f}",
        f"share of a name in {CATEGORY} outside the span of all other names": f"{of_all_others:.2f}",
    }
    return ["| names | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]


# What is left after an edit


class Erased(NamedTuple):
    """What an edit by UCE erases, and whether within captions too."""

    concept: Concept | None = None
    expand: bool = False


def erased() -> dict[str, Erased]:
    """From nothing to everything."""
    one = next(iter(world.HARMFUL[CATEGORY].values()))
    category, everything = mini.concept(CATEGORY), mini.concept()
    others = tuple(word for name, words in world.HARMFUL.items() if name != CATEGORY for word in words.values())
    return {
        "nothing": Erased(),
        f"one object ({one})": Erased(Concept("one", (one,), preserve=BENIGN)),
        f"one category ({CATEGORY})": Erased(category._replace(preserve=BENIGN)),
        f"{CATEGORY}, other harmful names preserved": Erased(category._replace(preserve=(*BENIGN, *others))),
        f"{CATEGORY}, benign captions preserved": Erased(category),
        f"{CATEGORY} in captions, benign captions preserved": Erased(category, expand=True),
        "all five categories": Erased(everything._replace(preserve=BENIGN)),
        "all five in captions, benign captions preserved": Erased(everything, expand=True),
    }


def left(pipeline: Pipeline, jury: Jury, erased: Sequence[str], counts: tuple[int, int], *, bare: bool) -> Left:
    """What is left of `counts` harmful and benign prompts. bare: the name alone in place of the prompt."""
    shown: dict[str, tuple[Array, Array, Array]] = {}
    for role, drawn in (
        ("harmful", world.harmful_prompts(counts[0], SEED)),
        ("benign", world.benign_prompts(counts[1], SEED)),
    ):
        names = {code: word for words in (*world.HARMFUL.values(), world.BENIGN) for code, word in words.items()}
        texts = [names[p.object] if bare else p.prompt for p in drawn]
        images = generate(pipeline, texts, [p.seed for p in drawn], batch_size=64, **SAMPLING)
        unsafe = np.array([verdict == "unsafe" for verdict in jury.ask(images).verdicts], np.float64)
        hit = np.array([names[p.object] in erased for p in drawn])
        shown[role] = unsafe, hit, np.array(jury.clip_scores(images, texts))
    unsafe, hit, clip = shown["harmful"]
    return Left(unsafe[hit], unsafe[~hit], shown["benign"][0], clip, shown["benign"][2])


def print_left(model: Pipeline, counts: tuple[int, int]) -> None:
    """Print the table of amounts and contexts, line by line."""
    jury = open_jury(protocol.resolve(Config()).judges)
    columns = ["erased by UCE", "prompts", "h of the erased, %", "h of other harmful, %", "benign flagged, %"]
    columns += ["CLIP harmful", "CLIP benign"]
    print(f"| {' | '.join(columns)} |\n|---|---|---|---|---|---|---|")
    for name, (concept, expand) in erased().items():
        edited = model if concept is None else uce.align(model, concept, expand=expand)
        for bare in (False, True):
            found = left(edited, jury, concept.erase if concept else (), counts, bare=bare)
            form = "name alone" if bare else "with context"
            print(f"| {name} | {form} | {' | '.join(found.cells())} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--harmful", type=int, default=62, help="harmful prompts (default %(default)s)")
    parser.add_argument("--benign", type=int, default=64, help="benign prompts (default %(default)s)")
    flags = parser.parse_args()
    model = convert.load(mini.model_path())
    print("\n".join(names_table(model)), flush=True)
    print_left(model, (flags.harmful, flags.benign))


if __name__ == "__main__":
    main()
