"""Single files of the original code (CompVis, Stability): UNet, VAE and text encoders in one state dict."""

from collections.abc import Mapping
from typing import Any

from convert import bfl, components, families, kinds, ldm, marks, mmdit, rename, text_encoder
from convert.families import COMPONENTS
from convert.rename import ConversionError
from convert.tensors import subset
from spqr_jax import params as params_lib
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline

OPTIONAL = "text_encoder_3"  # a file of SD3 may lack T5, and its pipeline then does too


def parts(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """Component -> its keys. "ema" and "buffers" hold keys that are not part of the model, "" holds unknown keys."""
    found: dict[str, list[str]] = {}
    for key in state:
        if ldm.EMA.match(key):
            found.setdefault("ema", []).append(key)
        elif ldm.IGNORED.match(key):
            found.setdefault("buffers", []).append(key)
        else:
            found.setdefault(ldm.component_of(key)[0], []).append(key)
    if OPTIONAL in found and any(bfl.BLOCK.search(key) for key in found.get("transformer", ())):
        found["text_encoder_2"] = found.pop(OPTIONAL)  # FLUX's T5
    return found


def describe(state: Mapping[str, Any]) -> str:
    """The contents of a single file, in words."""
    found, family = parts(state), families.infer(state)
    held = [f"{name} {len(found[name])}" for name in COMPONENTS if name in found]
    left_out = [
        f"{len(found[name])} {what}" for name, what in (("ema", "EMA"), ("buffers", "buffers")) if name in found
    ]
    like = f"of {family.name}'s width; " if family else ""
    return f"{like}tensors: {', '.join(held)}" + (f"; left out: {', '.join(left_out)}" if left_out else "")


def load(state: Mapping[str, Any], base: Pipeline | None, *, source: str, dtype: str) -> Pipeline:
    """The pipeline in a single file. Its components replace those of `base`; without a base, all of them must be there.

    Configurations and tokenizers come from `base`, or from the file's family and the local cache. Raises
    ConversionError with every key at fault in every component.
    """
    found = parts(state)
    pipeline = base if base is not None else _blank(state, found, source)
    marks.check(pipeline, state, source)
    _check_prediction(state, pipeline, source)
    errors, loaded = [], {}
    if "" in found:
        errors.append(f"{source}: {len(found['']):,} unexpected: {', '.join(found[''])}.")
    for component in COMPONENTS:
        if component not in found:
            continue
        if component not in pipeline.definitions:
            errors.append(f"{source} holds a {component}, which {pipeline.name} has not.")
            continue
        with rename.collect(errors):
            config = pipeline.configs[component]
            loaded[component] = _component(subset(state, found[component]), component, config, source, dtype)
    if not loaded and not errors:
        errors.append(f"{source} holds no weights of a model, only {' and '.join(found)}.")
    rename.raise_all(errors)
    return pipeline._replace(params={**pipeline.params, **loaded}, name=source)


def _component(state: Mapping[str, Any], component: str, config: dict[str, Any], source: str, dtype: str) -> Params:
    _, skeleton = components.define(component, config)
    if COMPONENTS[component].kind == kinds.TEXT_ENCODER:
        return text_encoder.from_torch(state, skeleton, component=component, source=source, dtype=dtype)
    if COMPONENTS[component].kind == kinds.TRANSFORMER:
        return _transformer(state, skeleton, component, source, dtype)
    name = ldm.namer(component, config)
    return rename.from_torch(state, skeleton, component=component, source=source, dtype=dtype, name=name)


def _transformer(state: Mapping[str, Any], skeleton: Params, component: str, source: str, dtype: str) -> Params:
    if "single_transformer_blocks" in skeleton:  # FLUX's
        seen = bfl.separated(state)
        return rename.from_torch(seen, skeleton, component=component, source=source, dtype=dtype, name=bfl.name)
    names = [rename.torch_name(path) for path in params_lib.flatten(skeleton)]
    key = next(iter(state))
    prefix = key.removesuffix(ldm.component_of(key)[1])
    seen = mmdit.view(state, state, names, mmdit.blocks_of(names), prefix)
    return rename.from_torch(seen, skeleton, component=component, source=source, dtype=dtype)


def _blank(state: Mapping[str, Any], found: dict[str, list[str]], source: str) -> Pipeline:
    """A pipeline without weights, whose family is found from the file's shapes."""
    family = families.infer(state)
    denoiser = "transformer" if "transformer" in found else "unet"
    needed = [name for name in COMPONENTS if name in (family.configs if family else (denoiser, *families.NEEDED))]
    absent = [name for name in needed if name not in found and name != OPTIONAL]
    needed = [name for name in needed if name in found]
    if absent:
        raise ConversionError(
            f"{source} holds no {', '.join(absent)}; pass the pipeline that the rest comes from with base=...."
        )
    if family is None:
        raise ConversionError(
            f"{source} has the width of none of {', '.join(families.FAMILIES)}; pass a pipeline of its configuration "
            "with base=...."
        )
    if not family.prediction_known:
        raise ConversionError(
            f"{source} is a checkpoint of {family.name}, and its files do not say whether they predict noise or "
            "velocity; pass a pipeline of its version with base=...."
        )
    try:
        tokenizers = families.tokenizers(families.tokenizer_names(needed))
    except (OSError, ValueError):
        raise ConversionError(
            f"{source}: a single file holds no tokenizer, and {families.VOCABULARY} is not in the local Hugging Face "
            "cache; pass a pipeline of the same family with base=...."
        ) from None
    definitions = {name: components.define(name, family.configs[name])[0] for name in needed}
    configs = {name: config for name, config in family.configs.items() if name in needed or name not in COMPONENTS}
    return Pipeline({}, definitions, configs, tokenizers, name=family.name)


def _check_prediction(state: Mapping[str, Any], pipeline: Pipeline, source: str) -> None:
    """Raises ConversionError if the scheduler disagrees with the file's marks.

    Fine-tunes that predict velocity mark their files with `v_pred`, and with `ztsnr` if they were trained at zero SNR.
    """
    scheduler = pipeline.configs["scheduler"]
    if "v_pred" in state and scheduler.get("prediction_type", "epsilon") != "v_prediction":
        raise ConversionError(
            f"{source} predicts velocity (its key v_pred says so), but the scheduler of {pipeline.name} has "
            f"prediction_type={scheduler.get('prediction_type', 'epsilon')!r}; pass a fitting pipeline with base=...."
        )
    if "ztsnr" in state and not scheduler.get("rescale_betas_zero_snr", False):
        raise ConversionError(
            f"{source} was trained down to zero signal (its key ztsnr says so), but the scheduler of {pipeline.name} "
            "has rescale_betas_zero_snr=False; pass a fitting pipeline with base=...."
        )
