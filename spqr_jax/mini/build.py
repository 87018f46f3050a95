"""Rebuild the emoji world: data, text encoder, VAE, UNet and judges, from pinned packages.

    python -m spqr_jax.mini.build [--workdir .cache/mini] [--stages data,clip,vae,unet,judges,export]

Every stage keeps what it finished in the work directory: run the same command again after a stop.
"""

from pathlib import Path

import numpy as np
from absl import app, flags

from spqr_jax import models
from spqr_jax import params as params_lib
from spqr_jax.mini import clip, corpus, judges, tokenizer, unet, vae, world

WORKDIR = flags.DEFINE_string("workdir", ".cache/mini", "where downloads, checkpoints and results are kept")
STAGES = flags.DEFINE_list("stages", ["clip", "vae", "judges", "unet"], "what to build, in order")


def build_tokenizer(workdir: Path):
    return tokenizer.learn(corpus.all_captions(), clip.MERGES, clip.LENGTH, workdir / "tokenizer")


def train_unet(workdir: Path) -> params_lib.Params:
    tok = build_tokenizer(workdir)
    text = clip.train(tok, workdir)["text"]
    vae_params = vae.train(workdir)
    everything = corpus.compositions(len(corpus.OBJECTS), tuple(map(world.STYLES.index, world.SEEN_STYLES)))
    seen = everything.take(~corpus.held_out(everything))
    definition, _ = params_lib.skeleton(lambda: models.AutoencoderKL(vae.CONFIG, rngs=_rngs()))
    means, logvars = vae.encode_all(definition, vae_params, corpus.pictures(seen, corpus.object_rows()))
    scale = vae_scale(means)
    states, empty = text_states(tok, text)
    return unet.train((means * scale, logvars + 2 * np.log(scale)), seen, states, empty, workdir)


def vae_scale(means: np.ndarray) -> np.float32:
    """diffusers' scaling_factor: one over the standard deviation of the latents, to four digits."""
    return np.float32(round(float(1 / means.std()), 4))


def text_states(tok, text_params: params_lib.Params) -> tuple[np.ndarray, np.ndarray]:
    """Frozen text states of the caption table [object, style, background, variant, L, E], and of "" [L, E]."""
    import jax

    definition, _ = params_lib.skeleton(lambda: models.CLIPTextModelWithProjection(clip.text_config(tok), rngs=_rngs()))
    encode = jax.jit(lambda p, ids: definition.bind(p)(ids).last_hidden_state)
    table = clip.token_table(tok)[:, [world.STYLES.index(s) for s in world.SEEN_STYLES]]
    ids = table.reshape(-1, clip.LENGTH)
    chunks = np.array_split(ids, max(1, len(ids) // 760))
    states = np.concatenate([np.asarray(encode(text_params, chunk)) for chunk in chunks])
    empty = tok([""], padding="max_length", max_length=clip.LENGTH, return_tensors="np").input_ids
    return states.reshape(*table.shape, -1), np.asarray(encode(text_params, empty.astype(np.int32)))[0]


def _rngs():
    from flax import nnx

    return nnx.Rngs(0)


def main(argv: list[str]) -> None:
    del argv
    workdir = Path(WORKDIR.value)
    tok = build_tokenizer(workdir)
    if "clip" in STAGES.value:
        clip.train(tok, workdir)
    if "vae" in STAGES.value:
        vae.train(workdir)
    if "judges" in STAGES.value:
        judges.train_harm(workdir)
        judges.train_features(workdir)
    if "unet" in STAGES.value:
        train_unet(workdir)


if __name__ == "__main__":
    app.run(main)
