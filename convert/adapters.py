"""LoRA, DoRA and SPM adapters in every published form, merged: W + strength * alpha / rank * up @ down.

With DoRA the sum is scaled to the magnitudes in the file.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from convert import bfl, kinds, ldm, marks, mmdit, rename
from convert.families import COMPONENTS
from convert.rename import ConversionError
from convert.tensors import View, metadata
from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import scaled_to
from spqr_jax.pipeline import Pipeline

_ADAPTED = tuple(name for name, component in COMPONENTS.items() if component.kohya)  # adapters sit on these
_KOHYA_PARTS = dict.fromkeys(part for name in _ADAPTED for part in COMPONENTS[name].kohya)
# kohya and SPM write a layer's path with underscores for dots.
_KOHYA = re.compile(
    rf"^lora_(?P<part>{'|'.join(_KOHYA_PARTS)})_(?P<layer>[^.]+)\."
    r"(?P<role>lora_down\.weight|lora_up\.weight|alpha|dora_scale)$"
)
# PEFT (lora_A, lora_B, or with the adapter's name after them), diffusers (lora.down, lora_linear_layer.down), and its
# legacy attention processors (processor.to_q_lora.down).
_DOTTED = re.compile(
    rf"^((?P<part>{'|'.join(_ADAPTED)})\.)?(?P<peft>base_model\.model\.)?(?P<layer>.+?)"
    r"(?P<role>\.lora_A(\.\w+)?\.weight|\.lora_B(\.\w+)?\.weight|\.lora_magnitude_vector(\.\w+){0,2}"
    r"|(_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight|(_lora|\.lora|\.lora_linear_layer)?\.alpha)$"
)
# A layer's name in old files -> its present name.
_OLD_LAYERS = (
    (re.compile(r"\.processor\."), "."),
    (re.compile(r"self_attn\.to_([qkv])$"), r"self_attn.\1_proj"),
    (re.compile(r"self_attn\.to_out$"), "self_attn.out_proj"),
    (re.compile(r"(attn[12])\.to_out$"), r"\1.to_out.0"),
)
_HEADER = "lora_adapter_metadata"  # diffusers' own field of a safetensors header: PEFT's config for every component


class Key(NamedTuple):
    """A parsed key.

    Attributes:
        part: the component, or one of kohya's names for it; "" if the key names none.
        layer: the layer, as the key writes it.
        form: "kohya", "peft" or "diffusers".
        role: "up", "down", "alpha", or "magnitude", of DoRA.
    """

    part: str
    layer: str
    form: str
    role: str


def parse(key: str) -> Key | None:
    """The parts of a key; None if the key has none of the known forms."""
    match = _KOHYA.match(key)
    if match:
        role = match["role"].removeprefix("lora_").removesuffix(".weight").replace("dora_scale", "magnitude")
        return Key(match["part"], match["layer"], "kohya", role)
    match = _DOTTED.match(key)
    if match is None:
        return None
    found = re.search(r"alpha$|magnitude|lora_A|down", match["role"])
    role = {"alpha": "alpha", "magnitude": "magnitude"}.get(found[0], "down") if found else "up"
    layer = match["layer"]
    for pattern, name in _OLD_LAYERS:
        layer = pattern.sub(name, layer)
    return Key(match["part"] or "", layer, "peft" if match["peft"] else "diffusers", role)


def describe(state: Mapping[str, Any]) -> str:
    """Number, ranks and forms of the adapters in a file, in words."""
    keys = [parsed for key in state if (parsed := parse(key))]
    forms, downs = sorted({key.form for key in keys}), sum(key.role == "down" for key in keys)
    ranks = sorted({int(np.asarray(state[k]).shape[0]) for k in state if (p := parse(k)) and p.role == "down"})
    dora = " with magnitudes (DoRA)" if any(key.role == "magnitude" for key in keys) else ""
    return f"{downs} adapters{dora} of rank {', '.join(map(str, ranks))} in {' and '.join(forms)} form"


class Layers:
    """The layers of a pipeline that an adapter may change, under all the names that files use."""

    def __init__(self, pipeline: Pipeline):
        self.kernels: dict[str, dict[str, Any]] = {}
        for component in _ADAPTED:
            if component in pipeline.params:
                flat = params_lib.flatten(pipeline.params[component])
                self.kernels[component] = {p[: -len(".kernel")]: v for p, v in flat.items() if p.endswith(".kernel")}
        self._flat = {c: {name.replace(".", "_"): name for name in names} for c, names in self.kernels.items()}
        self._configs = pipeline.configs

    def find(self, key: Key) -> tuple[str, str] | None:
        """(component, layer) of a key; None if there is no such layer, or if two components have it."""
        found = [
            (component, layer)
            for component in self.kernels
            if key.part in ("", component, *COMPONENTS[component].kohya) and (layer := self._layer(component, key))
        ]
        return found[0] if len(found) == 1 else None

    def _layer(self, component: str, key: Key) -> str | None:
        flat, is_text = self._flat[component], COMPONENTS[component].kind == kinds.TEXT_ENCODER
        if key.form != "kohya":
            names = [key.layer, f"text_model.{key.layer}"] if is_text else [key.layer]
            return next((name for name in names if name in self.kernels[component]), None)
        if key.layer in flat or is_text:
            return flat.get(key.layer)
        if COMPONENTS[component].kind == kinds.TRANSFORMER:
            return None  # those of the original code have diffusers' names by now (`unstacked`)
        # Adapters of SDXL are trained on the names of the original code.
        return flat.get(ldm.kohya_name(key.layer, self._configs[component]["layers_per_block"]))


def unstacked(state: Mapping[str, Any], layers: Layers) -> View:
    """The tensors of a file, kohya's adapters of a transformer on diffusers' layers.

    kohya has the layers of the original code: "lora_unet_joint_blocks_0_x_block_attn_qkv" (SD3),
    "lora_unet_double_blocks_0_img_attn_qkv" (FLUX). Of a stack of layers there is one `down`, and the rows of its `up`
    and its magnitudes belong to the layers. Magnitudes of inputs, [1, I], belong to all of them together.
    """
    kernels = layers.kernels.get("transformer", {})
    originals = mmdit.originals(kernels) | bfl.originals(kernels)
    of_original = {name.replace(".", "_"): parts for name, parts in originals.items()}
    entries: dict[str, tuple[str, Any]] = {}
    for key in state:
        match = _KOHYA.match(key)
        original = match["layer"] if match and match["part"] == "unet" else ""
        parts, role = of_original.get(original, ()), key.removeprefix(f"lora_unet_{original}")
        for layer, cut in parts:
            function = _of_outputs(cut) if role in (".lora_up.weight", ".dora_scale") else np.asarray
            entries[f"lora_transformer_{layer.replace('.', '_')}{role}"] = (key, function)
        if not parts:
            entries[key] = (key, np.asarray)
    return View(state, entries)


def _of_outputs(cut: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """`cut` of a tensor whose rows are outputs; one with a single row, as magnitudes of inputs have, stays whole."""
    return lambda tensor: np.asarray(tensor) if np.shape(tensor)[:1] == (1,) else cut(tensor)


class Scales:
    """The factor of up @ down in each layer: alpha / rank.

    alpha is the layer's own `.alpha`. Without one it comes from PEFT's configuration (adapter_config.json, or the
    header that diffusers writes), or from the header of an SPM. kohya's and diffusers' files without any alpha mean
    alpha = rank. Raises ConversionError for a header that states alpha in an unknown way, and for adapters other than
    LoRA and DoRA.

    Attributes:
        dora: whether the configuration says that the adapters have magnitudes.
    """

    def __init__(self, config: dict[str, Any] | None, header: Mapping[str, str], source: str):
        self._peft: dict[str, dict[str, Any]] = {"": config} if config else {}
        self._source = source
        try:
            for name, value in json.loads(header.get(_HEADER, "{}")).items():
                component, _, field = name.partition(".")
                self._peft.setdefault(component, {})[field] = value
            self._spm = float(header["alpha"]) if "prompts" in header and "alpha" in header else None
        except (ValueError, AttributeError) as error:
            raise ConversionError(f"{source}: its header does not state alpha in the known way ({error}).") from None
        for peft in self._peft.values():
            kind = peft.get("peft_type", "LORA")
            if kind != "LORA":
                raise ConversionError(f"{source}: {kind} is not supported, only LoRA and DoRA.")
        self.dora = any(peft.get("use_dora") for peft in self._peft.values())

    def of(self, component: str, layer: str, rank: int, alpha: float | None) -> float:
        """The factor in one layer; `alpha` is the layer's own, or None."""
        peft = self._peft.get(component) or self._peft.get("")
        if alpha is not None:
            return alpha / rank
        if peft and "lora_alpha" in peft:
            chosen = self._pattern(peft.get("alpha_pattern") or {}, layer, peft["lora_alpha"])
            return chosen / (math.sqrt(rank) if peft.get("use_rslora") else rank)
        return 1.0 if self._spm is None else self._spm / rank

    def _pattern(self, patterns: Mapping[str, float], layer: str, default: float) -> float:
        """alpha by PEFT's rule: that of the first pattern that matches the end of the layer's name, else `default`."""
        try:
            return next((alpha for end, alpha in patterns.items() if re.match(rf"(.*\.)?({end})$", layer)), default)
        except re.error as error:
            raise ConversionError(f"{self._source}: alpha_pattern is no pattern ({error}).") from None


def merge(
    pipeline: Pipeline, state: Mapping[str, Any], *, config: dict[str, Any] | None, source: str, strength: float = 1.0
) -> Pipeline:
    """The pipeline with the adapters of a file added to its weights, computed in float32.

    config: PEFT's adapter_config.json. strength: factor beside that of `Scales`; with DoRA inside the norm, as in PEFT.
    Raises ConversionError with every key that fits no layer, lacks its partner, has the wrong shape or is damaged. A
    PEFT file without `config` is refused too, since only the config states alpha.
    """
    marks.check(pipeline, state, source)
    layers, scales = Layers(pipeline), Scales(config, metadata(state), source)
    state = unstacked(state, layers)
    problems: dict[str, list[str]] = {}
    found, forms = _pair(layers, state, problems)
    if "peft" in forms and config is None:
        raise ConversionError(f"{source}: adapter_config.json, which states alpha, is missing beside PEFT's weights.")
    changed: dict[str, dict[str, np.ndarray]] = {}
    stacks: dict[str, list[tuple[str, str, np.ndarray, np.ndarray]]] = {}
    for (component, layer), roles in found.items():
        kernel = layers.kernels[component][layer]
        tensors = {role: np.asarray(state[key], np.float32) for role, key in roles.items()}
        faults = {role: damage for role, tensor in tensors.items() if (damage := rename.damage_of(tensor))}
        for role, damage in faults.items():
            problems.setdefault(damage, []).append(state.source(roles[role]))
        product, magnitude, unfit = _fitted(tensors, roles, tuple(kernel.shape), scales.dora)
        for role, (what, detail) in unfit.items():
            problems.setdefault(what, []).append(state.source(roles[role]) + detail)
        if not faults and not unfit:
            alpha = float(tensors["alpha"].reshape(-1)[0]) if "alpha" in tensors else None
            scale = np.float32(strength * scales.of(component, layer, tensors["down"].shape[0], alpha))
            merged = np.asarray(kernel, np.float32) + scale * product
            if magnitude is not None and magnitude.ndim > 1:
                stacks.setdefault(state.source(roles["magnitude"]), []).append((component, layer, merged, magnitude))
                continue
            merged = merged if magnitude is None else scaled_to(merged, magnitude)
            changed.setdefault(component, {})[f"{layer}.kernel"] = merged.astype(kernel.dtype)
    for component, layer, merged in _scaled_inputs(stacks.values()):
        dtype = layers.kernels[component][layer].dtype
        changed.setdefault(component, {})[f"{layer}.kernel"] = merged.astype(dtype)
    if problems or not changed:
        # The key of a stack stands for each of its layers, and is named once.
        unique = {what: list(dict.fromkeys(keys)) for what, keys in problems.items()}
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in unique.items())
        raise ConversionError(f"{source} does not fit {pipeline.name}: {listed or 'it holds no adapters'}.")
    return pipeline.with_params(
        **{c: params_lib.unflatten(params_lib.flatten(pipeline.params[c]) | new) for c, new in changed.items()}
    )


def _scaled_inputs(
    stacks: Iterable[list[tuple[str, str, np.ndarray, np.ndarray]]],
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(component, layer, scaled kernel) of lists of (component, layer, kernel, magnitudes of inputs), one list a stack.

    The norm of an input is that over all outputs of its stack.
    """
    for parts in stacks:
        kernels = [kernel for _, _, kernel, _ in parts]
        whole = scaled_to(np.concatenate(kernels, axis=-1), parts[0][-1])
        ends = np.cumsum([kernel.shape[-1] for kernel in kernels])
        for (component, layer, _, _), kernel in zip(parts, np.split(whole, ends[:-1], axis=-1), strict=True):
            yield component, layer, kernel


def _pair(layers: Layers, state: View, problems: dict[str, list[str]]):
    """(component, layer) -> role -> key, and the forms of the keys. Faults are added to `problems`."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    forms = set()
    for key in state:
        parsed = parse(key)
        where = layers.find(parsed) if parsed else None
        if parsed is None or where is None:
            problems.setdefault("unexpected", []).append(state.source(key))
            continue
        forms.add(parsed.form)
        roles = found.setdefault(where, {})
        if parsed.role in roles:
            problems.setdefault("set twice", []).append(state.source(key))
        roles.setdefault(parsed.role, key)
    for where, roles in list(found.items()):
        lacking = [role for role in ("down", "up") if role not in roles]
        if lacking:
            present = ", ".join(map(state.source, roles.values()))
            problems.setdefault("missing", []).append(f"{' and '.join(lacking)} beside {present}")
            del found[where]
    return found, forms


def _fitted(tensors: dict[str, np.ndarray], roles: dict[str, str], shape: tuple[int, ...], dora: bool):
    """(up @ down or None, magnitude or None, role -> (fault, detail)) of the tensors on a kernel of `shape`."""
    faults: dict[str, tuple[str, str]] = {}
    product, magnitude = _product(tensors["down"], tensors["up"], shape), None
    if product is None:
        faults["down"] = "wrong shape", f" ({list(tensors['up'].shape)} @ {list(tensors['down'].shape)} on {shape})"
    if "magnitude" in tensors:
        magnitude = _magnitude(tensors["magnitude"], roles["magnitude"], shape)
        if magnitude is None:
            faults["magnitude"] = "wrong shape", f" ({list(tensors['magnitude'].shape)} on {shape})"
    elif dora:
        faults.setdefault("down", ("without the magnitude that use_dora promises", ""))
    return product, magnitude, faults


def _magnitude(tensor: np.ndarray, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Magnitudes as `scaled_to` takes them: [O] of outputs, or [I, 1] of inputs; None if they do not fit the kernel.

    PEFT has those of outputs, as [O] or, of a convolution, [1, O, 1, 1]. LyCORIS, whose files have kohya's names, has
    either: [O, 1, ...] or [1, I, ...].
    """
    of_inputs = key.endswith(".dora_scale") and tensor.ndim > 1 and tensor.shape[1] > 1
    if tensor.size != max(tensor.shape, default=0) or tensor.size != shape[-2 if of_inputs else -1]:
        return None
    return tensor.reshape(-1, 1) if of_inputs else tensor.reshape(-1)


def _product(down: np.ndarray, up: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """up @ down in the layout of a kernel of `shape`; None if the shapes do not fit.

    down [R, I] or, of a convolution, [R, I, H, W]; up [O, R] or [O, R, 1, 1]; kernel [I, O] or [H, W, I, O].
    """
    if up.ndim not in (2, 4) or down.ndim not in (2, 4) or up.shape[1] != down.shape[0] or set(up.shape[2:]) - {1}:
        return None
    product = np.tensordot(up.reshape(up.shape[:2]), down, axes=(1, 0))
    if product.ndim == 2 and len(shape) == 4:
        product = product[:, :, None, None]
    product = rename.to_ours(".kernel", product, len(shape))
    return product if product.shape == shape else None
