"""Rebuild the emoji world: data, text encoder, VAE, UNet, judges and transformer, from pinned packages.

    python -m spqr_jax.recipe.build [--workdir .cache/mini] [--stages export,measure]

The stages are data, clip, vae, judges, unet, decoder, export, transformer and measure, and all run by default. Every
stage keeps what it finished in the work directory: run the same command again after a stop. `data` needs npm, `export`
needs torch (pip install '.[convert]'). What they write is what ships in spqr_jax/mini/assets, with the losses of every
training. `transformer` starts from what `export` wrote, so it can also run alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from spqr_jax import mini
from spqr_jax import params as params_lib
from spqr_jax.backbones import models
from spqr_jax.config import Config
from spqr_jax.devices import huge_pages
from spqr_jax.mini import corpus, world
from spqr_jax.params import Params
from spqr_jax.recipe import clip, judges, tokenizer, training, transformer, unet, vae

WORKDIR = flags.DEFINE_string("workdir", ".cache/mini", "where downloads, checkpoints and results are kept")
STAGES = flags.DEFINE_list("stages", None, "what to build, in order; default all")
PROMPTS = flags.DEFINE_integer("prompts", 300, "prompts of each kind that the generator is measured on")
# As configs/mini.py and configs/backbones_mini.py sample.
SAMPLING: dict[str, dict[str, Any]] = {
    "": {"steps": 6, "guidance": 4.0, "scheduler": "dpmpp"},
    "transformer": {"steps": 8, "guidance": 4.0, "scheduler": "flow_euler"},
}


def build_data(workdir: Path) -> None:
    from spqr_jax.mini import catalogue
    from spqr_jax.recipe import pack

    pack.build(workdir / "packages", catalogue.ASSETS)


def build_tokenizer(workdir: Path):
    return tokenizer.learn(corpus.all_captions(), clip.MERGES, clip.LENGTH, workdir / "tokenizer")


def build_clip(workdir: Path) -> Params:
    return clip.train(build_tokenizer(workdir), workdir)


def build_judges(workdir: Path) -> tuple[Params, Params]:
    return judges.train_harm(workdir), judges.train_features(workdir)


def build_unet(workdir: Path) -> Params:
    """Train on the latents of every seen composition in the two seen styles, encoded once."""
    finished = workdir / "unet" / "final"
    if finished.is_dir():
        from spqr_jax.files import checkpoint

        return checkpoint.load(finished)
    seen = _seen_compositions()
    means, logvars = _latents(workdir, seen)
    scale = scaling_factor(workdir)
    states, empty = _text_states(build_tokenizer(workdir), build_clip(workdir)["text"])
    return unet.train((means * scale, logvars + 2 * np.log(scale)), seen, states, empty, workdir)


def build_decoder(workdir: Path) -> Params:
    return vae.train_decoder(vae.train(workdir), workdir)


def export(workdir: Path) -> None:
    from spqr_jax.recipe import export as export_lib

    tok, clip_params = build_tokenizer(workdir), build_clip(workdir)
    factor = float(scaling_factor(workdir))
    pipe = export_lib.assemble(tok, clip_params["text"], build_decoder(workdir), build_unet(workdir), factor)
    export_lib.save_model(pipe, mini.MODEL)
    export_lib.save_judges(tok, clip_params, *build_judges(workdir), mini.JUDGES)
    training.keep_logs(workdir, ("clip", "vae", "harm", "features", "unet", "decoder"), mini.LOGS)


def build_transformer(workdir: Path) -> None:
    """Train on the UNet's compositions, between the text encoder and the VAE that ship, and write what ships."""
    import convert
    from spqr_jax.recipe import export as export_lib

    pipe = transformer.around(convert.load(mini.model_path()))
    trained = transformer.train(pipe, _seen_compositions(), workdir)
    export_lib.save_model(pipe.with_params(transformer=trained), mini.TRANSFORMER)
    training.keep_logs(workdir, ("transformer",), mini.LOGS)


def measure(workdir: Path) -> None:
    del workdir
    from spqr_jax.recipe import export as export_lib
    from spqr_jax.recipe import measure as measure_lib
    from spqr_jax.run import names

    jury = measure_lib.of_the_world()
    found: dict[str, Any] = {"": measure_lib.of_judges(jury), "transformer": {}}
    for name, sampling in SAMPLING.items():
        pipe = names.backbone(Config(base=f"mini:{name}" if name else "mini"))
        found[name]["generator"] = measure_lib.generator(pipe, jury, PROMPTS.value, **sampling)
        export_lib.write_measured(mini.JUDGES / mini.MEASURED[name], found[name])
        print((mini.JUDGES / mini.MEASURED[name]).read_text())


def scaling_factor(workdir: Path) -> np.float32:
    """diffusers' scaling_factor: one over the standard deviation of latents, to two digits, from one image in 16."""
    seen = _seen_compositions()
    means, _ = _latents(workdir, seen.take(np.arange(0, len(seen.object), 16)))
    return np.float32(round(float(1 / means.std()), 2))


def _seen_compositions() -> corpus.Compositions:
    styles = tuple(world.STYLES.index(style) for style in world.SEEN_STYLES)
    everything = corpus.compositions(len(corpus.OBJECTS), styles)
    return everything.take(~corpus.held_out(everything))


def _latents(workdir: Path, c: corpus.Compositions) -> tuple[np.ndarray, np.ndarray]:
    definition, _ = params_lib.skeleton(lambda: models.AutoencoderKL(vae.CONFIG, rngs=params_lib.OneKey()))
    return vae.encode_all(definition, vae.train(workdir), corpus.pictures(c, corpus.object_rows()))


def _text_states(tok, text_params: Params) -> tuple[np.ndarray, np.ndarray]:
    """Frozen text states of the caption table [object, style, background, variant, L, E], and of "" [L, E]."""
    config = clip.text_config(tok)
    definition, _ = params_lib.skeleton(lambda: models.CLIPTextModelWithProjection(config, rngs=params_lib.OneKey()))
    encode = jax.jit(lambda p, ids: definition.bind(p)(ids).last_hidden_state)
    table = clip.token_table(tok)[:, [world.STYLES.index(s) for s in world.SEEN_STYLES]]
    flat = table.reshape(-1, clip.LENGTH)
    states = np.concatenate([np.asarray(encode(text_params, rows)) for rows in np.array_split(flat, len(flat) // 760)])
    empty = tok([""], padding="max_length", max_length=clip.LENGTH, return_tensors="np").input_ids
    return states.reshape(*table.shape, -1), np.asarray(encode(text_params, empty.astype(np.int32)))[0]


BUILD: dict[str, Callable[[Path], object]] = {
    "data": build_data,
    "clip": build_clip,
    "vae": vae.train,
    "judges": build_judges,
    "unet": build_unet,
    "decoder": build_decoder,
    "export": export,
    "transformer": build_transformer,
    "measure": measure,
}


def main(argv: list[str]) -> None:
    del argv
    chosen = STAGES.value or list(BUILD)
    if unknown := set(chosen) - set(BUILD):
        sys.exit(f"--stages: unknown {', '.join(sorted(unknown))}; expected some of {','.join(BUILD)}.")
    for name, stage in BUILD.items():
        if name in chosen:
            stage(Path(WORKDIR.value))


if __name__ == "__main__":
    huge_pages.restart()
    app.run(main)
