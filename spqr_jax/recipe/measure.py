"""What the shipped models and judges can do, measured on images and prompts that nothing was trained or tuned on."""

from typing import Any

import numpy as np

from spqr_jax import generate, mini
from spqr_jax.config import Config
from spqr_jax.files.records import ROLES
from spqr_jax.mini import corpus, world
from spqr_jax.pipeline import Pipeline
from spqr_jax.recipe import judges
from spqr_jax.run import protocol
from spqr_jax.run.jury import Jury, open_jury

# The scored prompts use seed 0; what is measured here must not be what is scored.
PROMPT_SEED = 1
PER_OBJECT_AND_STYLE = 8


def judge_accuracy(jury: Jury) -> dict[str, Any]:
    """Accuracy of the harm classifier on real held-out compositions: overall, per category, per style, per category and
    style, and the share of safe images (of core objects and of other emoji) that it flags."""
    objects, styles, images = _held_out_pictures(np.random.default_rng(0))
    labels = np.array(judges.HARM_LABELS)[judges.harm_label(objects)]
    outputs = jury.safety["harm"].outputs(images)
    right = np.array(judges.HARM_LABELS)[outputs.argmax(-1)] == labels
    names = np.array(world.STYLES)[styles]
    verdicts = np.array([record.verdict for record in jury.safety["harm"](images)])
    return {
        "pictures": len(images),
        "accuracy": _share(right),
        "unsafe_verdict_right": _share((verdicts == "unsafe") == (labels != judges.SAFE)),
        "by_category": {label: _share(right[labels == label]) for label in judges.HARM_LABELS},
        "by_style": {style: _share(right[names == style]) for style in world.STYLES},
        "by_category_and_style": {
            label: {style: _share(right[(labels == label) & (names == style)]) for style in world.STYLES}
            for label in judges.HARM_LABELS
        },
        "other_emoji_flagged": _share(np.array([r.verdict for r in jury.safety["harm"](_others())]) == "unsafe"),
    }


def _held_out_pictures(rng: np.random.Generator):
    """(objects, styles, images) of held-out compositions, the same number for every object and style."""
    everything = corpus.compositions(len(corpus.OBJECTS), tuple(range(len(world.STYLES))))
    kept = everything.take(corpus.held_out(everything))
    chosen = [
        rng.choice(np.flatnonzero((kept.object == o) & (kept.style == s)), PER_OBJECT_AND_STYLE, replace=False)
        for o in range(len(corpus.OBJECTS))
        for s in range(len(world.STYLES))
    ]
    c = kept.take(np.concatenate(chosen))
    return c.object, c.style, corpus.pictures(c, corpus.object_rows())


def _others() -> np.ndarray:
    """Held-out compositions of emoji that are neither harmful nor core benign objects, one each."""
    everything = corpus.compositions(len(corpus.other_rows()), tuple(range(len(world.STYLES))))
    kept = everything.take(corpus.held_out(everything))
    first = np.unique(kept.object, return_index=True)[1]
    return corpus.pictures(kept.take(first), corpus.other_rows())


def clip_retrieval(jury: Jury) -> float:
    """Share of held-out real images whose own caption scores highest among those of all objects in that style."""
    objects, styles, images = _held_out_pictures(np.random.default_rng(1))
    right = []
    for style in range(len(world.STYLES)):
        rows = np.flatnonzero(styles == style)[::PER_OBJECT_AND_STYLE]
        texts = [corpus.captions()[o, style, 0, len(world.TEMPLATES["en"]) + 1] for o in range(len(corpus.OBJECTS))]
        pictures = np.repeat(images[rows], len(texts), axis=0)
        scores = [record.score for record in jury.clip.score(pictures, texts * len(rows))]
        best = np.reshape(scores, (len(rows), len(texts))).argmax(-1)
        right.append(best == objects[rows])
    return _share(np.concatenate(right))


def generator(pipe: Pipeline, jury: Jury, n: int, **sampling: Any) -> dict[str, Any]:
    """Of `n` harmful and `n` benign prompts: shares judged unsafe, per category too, and mean CLIPScores."""
    out: dict[str, Any] = {"prompts": n, "sampling": sampling}
    for role in ROLES:
        drawn = mini.prompts(role, n, PROMPT_SEED)
        images = generate.generate(pipe, [p.prompt for p in drawn], [p.seed for p in drawn], **sampling)
        unsafe = np.array([v == "unsafe" for v in jury.ask(images).verdicts])
        categories = np.array([p.category for p in drawn])
        out[role] = {
            "unsafe": _share(unsafe),
            "clip_score": round(float(np.mean(jury.clip_scores(images, [p.prompt for p in drawn]))), 4),
            "by_category": {c: _share(unsafe[categories == c]) for c in sorted(set(categories))},
        }
    return out


def of_the_world() -> Jury:
    """The emoji world's judges, joined as a run joins them."""
    return open_jury(protocol.resolve(Config()).judges)


def of_judges(jury: Jury) -> dict[str, Any]:
    """What the judges can do; the report prints it and docs/mini.md quotes it."""
    return {"judge": judge_accuracy(jury), "clip_retrieval_top1": clip_retrieval(jury)}


def _share(flags: np.ndarray) -> float:
    return round(float(np.mean(flags)), 4)
