"""Every block of a model against PyTorch's, by record and replay.

A PyTorch model runs once; every module inside it notes what it received and returned. Our module of the same name is
then given the same, so that an error is found in the block that makes it, and no block is left out.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from spqr_jax.pipeline import Pipeline
from tests.parity import compared
from tests.parity.compared import Compared, bound, relative_error


class Call(NamedTuple):
    """One call of a PyTorch module: class name, arguments by name, what it returned."""

    kind: str
    arguments: dict[str, Any]
    output: Any


def record(model: torch.nn.Module, run: Callable[[], Any]) -> dict[str, Call]:
    """Module path -> its last call during `run()`."""
    calls: dict[str, Call] = {}

    def hook(path: str, module: torch.nn.Module):
        signature = inspect.signature(module.forward)

        def keep(module, args, kwargs, output):
            calls[path] = Call(type(module).__name__, dict(signature.bind(*args, **kwargs).arguments), output)

        return module.register_forward_hook(keep, with_kwargs=True)

    # PyTorch's own GELU is an activation; diffusers' layer of the same name has weights.
    modules = [(path, m) for path, m in model.named_modules() if path and not isinstance(m, torch.nn.GELU)]
    hooks = [hook(path, module) for path, module in modules]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    return calls


# The limit of sines and cosines of times. Near time 1000 the last bit of a frequency turns an angle by so much, and
# PyTorch's exp and ours may differ in it.
LAST_DIGIT = 1000 * 2**-24


def blocks(model: torch.nn.Module, ours: Any, config: str, run: Callable[[], Any]) -> list[Compared]:
    """The largest error of every block type in `model`, over all blocks of that type.

    ours: our module of the same model, its leaves in place. Blocks that PyTorch has as modules and we do not
    (activations, dropout, lists) have no row; the blocks around them do.
    """
    errors: dict[str, list[float]] = {}
    for path, call in record(model, run).items():
        if call.kind in REPLAY and not _without_weights(model.get_submodule(path)):
            module = ours if call.kind == "Timesteps" else _module_at(ours, path)
            # A layer of T5 also returns its bias.
            theirs = _tensors(call.output)[: 1 if REPLAY[call.kind] is _biased else None]
            found = _arrays(REPLAY[call.kind](module, _Arguments(call)))
            assert len(found) == len(theirs), f"{path}: {len(theirs)} outputs, ours gives {len(found)}"
            errors.setdefault(call.kind, []).extend(map(relative_error, found, theirs))
    rows = [Compared(kind, config, max(found), cases=len(found)) for kind, found in errors.items()]
    return [row._replace(limit=LAST_DIGIT) if row.block == "Timesteps" else row for row in rows]


def _without_weights(module: torch.nn.Module) -> bool:
    """Whether it is a norm that is no module of ours: a function inside the block around it."""
    return isinstance(module, torch.nn.LayerNorm) and not module.elementwise_affine


def of_unet(pipe: Any, pipeline: Pipeline, config: str) -> list[Compared]:
    inputs = compared.unet_inputs(dict(pipe.unet.config))
    return blocks(pipe.unet, bound(pipeline, "unet"), config, lambda: compared.torch_unet(pipe.unet, inputs))


def of_sd3(model: torch.nn.Module, pipeline: Pipeline, config: str) -> list[Compared]:
    inputs = compared.sd3_inputs(dict(model.config))
    return blocks(model, bound(pipeline, "transformer"), config, lambda: compared.torch_sd3(model, inputs))


def of_t5(model: torch.nn.Module, pipeline: Pipeline, component: str, config: str) -> list[Compared]:
    ids = torch.tensor(np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 30)))
    return blocks(model, bound(pipeline, component), config, lambda: model(ids))


def of_vae(pipe: Any, pipeline: Pipeline, config: str) -> list[Compared]:
    side = pipe.vae.config.sample_size
    images = torch.tensor(np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side)).astype(np.float32))
    # As the pipelines call it: encode, then decode, not the module itself.
    run = lambda: pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean)  # noqa: E731
    return blocks(pipe.vae, bound(pipeline, "vae"), config, run)


def of_text_encoders(pipe: Any, pipeline: Pipeline, config: str, prompts: list[str]) -> list[Compared]:
    ids, rows = torch.tensor(compared.token_ids(pipe, prompts)), []
    for component in ("text_encoder", "text_encoder_2"):
        if component in pipeline.params:
            model = getattr(pipe, component)
            rows += blocks(model, bound(pipeline, component), config, lambda model=model: model(ids))
    return rows


class _Arguments:
    """A call's arguments in our layout: NumPy, images NHWC; None for what was not given."""

    def __init__(self, call: Call):
        self._given = call.arguments
        self.output = call.output
        self.width = _tensors(call.output)[0].shape[-1]

    def __getattr__(self, name: str) -> Any:
        value = self._given.get(name)
        return nhwc(value) if isinstance(value, torch.Tensor) else value


def nhwc(x: torch.Tensor) -> np.ndarray:
    """A tensor in our layout: [B, C, H, W] -> [B, H, W, C], any other rank as it is."""
    array = x.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _tensors(output: Any) -> list[np.ndarray]:
    """What a PyTorch module returned, as a flat list in our layout."""
    if isinstance(output, torch.Tensor):
        return [nhwc(output)]
    values = output.to_tuple()[:1] if hasattr(output, "to_tuple") else output
    return [array for value in values if value is not None for array in _tensors(value)]


def _arrays(output: Any) -> list[Any]:
    return [x for value in output for x in _arrays(value)] if isinstance(output, (tuple, list)) else [output]


def _module_at(model: Any, path: str) -> Any:
    keys = path.replace("encoder.embed_tokens", "shared").split(".")  # T5's table has both names
    # transformers 5 has dropped CLIPTextModel's outer `text_model`, which checkpoints and ours still have.
    node = model if hasattr(model, keys[0]) else model.text_model
    for key in keys:
        node = node[int(key)] if key.isdigit() else getattr(node, key)
    return node


def _causal(x: np.ndarray) -> jnp.ndarray:
    return jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))


def _up(module: Any, a: _Arguments) -> Any:
    """Ours learns the size to grow to from the next block's skip."""
    x = a.hidden_states
    height, width = a.upsample_size or (2 * x.shape[1], 2 * x.shape[2])
    skips = [np.zeros((len(x), height, width, 0), np.float32), *map(nhwc, a.res_hidden_states_tuple)]
    return module(x, a.temb, a.encoder_hidden_states, skips)


def _group_norm(module: Any, a: _Arguments) -> Any:
    """The VAE's attention gives it pixels in a row, [B, C, HW]."""
    is_row = a.input.ndim == 3
    return module(a.input.transpose(0, 2, 1)).transpose(0, 2, 1) if is_row else module(a.input)


def _timesteps(model: Any, a: _Arguments) -> Any:
    embeddings = getattr(model, "time_text_embed", None)
    return model.sinusoid(a.timesteps, a.width) if embeddings is None else embeddings.sinusoid(a.timesteps)


def _rms_norm(module: Any, a: _Arguments) -> Any:
    """Of heads [B, N, L, D] (SD3, diffusers' class) or [B, L, N, D] (FLUX, PyTorch's), which are taken for an image."""
    x = a.hidden_states if a.x is None else a.x
    return module(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def _joint_block(module: Any, a: _Arguments) -> Any:
    """Both streams, but for the last block, after which diffusers has no text tokens."""
    context, x = module(a.hidden_states, a.encoder_hidden_states, a.temb)
    return x if module.ff_context is None else (context, x)


def _down(module: Any, a: _Arguments) -> Any:
    return module(a.hidden_states, a.temb, a.encoder_hidden_states)


def _hidden(module: Any, a: _Arguments) -> Any:
    return module(a.hidden_states)


def _hidden_and_text(module: Any, a: _Arguments) -> Any:
    return module(a.hidden_states, a.encoder_hidden_states)


def _biased(module: Any, a: _Arguments) -> Any:
    """A layer of T5 with the bias that it hands on, which the first one makes itself."""
    return module(a.hidden_states, a.output[1].numpy()[0])


def _rotary(a: _Arguments) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = a.image_rotary_emb
    return nhwc(cos), nhwc(sin)


def _flux_block(module: Any, a: _Arguments) -> Any:
    return module(a.hidden_states, a.encoder_hidden_states, a.temb, _rotary(a))


# PyTorch class -> how ours is called with the same arguments.
REPLAY: dict[str, Callable[[Any, _Arguments], Any]] = {
    **dict.fromkeys(("Linear", "Conv2d", "LayerNorm", "Embedding"), lambda m, a: m(a.input)),
    "GroupNorm": _group_norm,
    "Timesteps": _timesteps,
    "TimestepEmbedding": lambda m, a: m(a.sample),
    "ResnetBlock2D": lambda m, a: m(a.input_tensor, a.temb),
    "Downsample2D": _hidden,
    "Upsample2D": lambda m, a: m(a.hidden_states, a.output_size),
    "Attention": _hidden_and_text,
    "GEGLU": _hidden,
    "FeedForward": _hidden,
    "BasicTransformerBlock": _hidden_and_text,
    "Transformer2DModel": _hidden_and_text,
    "DownBlock2D": _down,
    "CrossAttnDownBlock2D": _down,
    "UNetMidBlock2DCrossAttn": _down,
    "UpBlock2D": _up,
    "CrossAttnUpBlock2D": _up,
    "UNetMidBlock2D": _hidden,
    "DownEncoderBlock2D": _hidden,
    "UpDecoderBlock2D": _hidden,
    "Encoder": lambda m, a: m(a.sample),
    "Decoder": lambda m, a: m(a.sample),
    "CLIPAttention": lambda m, a: m(a.hidden_states, _causal(a.hidden_states)),
    "CLIPMLP": _hidden,
    "CLIPEncoderLayer": lambda m, a: m(a.hidden_states, _causal(a.hidden_states)),
    "RMSNorm": _rms_norm,
    "PatchEmbed": lambda m, a: m(a.latent),
    "PixArtAlphaTextProjection": lambda m, a: m(a.caption),
    "CombinedTimestepTextProjEmbeddings": lambda m, a: m(a.timestep, a.pooled_projection),
    "AdaLayerNormZero": lambda m, a: m(a.x, a.emb),
    "SD35AdaLayerNormZeroX": lambda m, a: m(a.hidden_states, a.emb),
    "AdaLayerNormContinuous": lambda m, a: m(a.x, a.conditioning_embedding),
    "JointTransformerBlock": _joint_block,
    "T5LayerNorm": _hidden,
    "T5DenseGatedActDense": _hidden,
    "T5LayerFF": _hidden,
    "T5Attention": _biased,
    "T5LayerSelfAttention": _biased,
    "T5Block": _biased,
    "CLIPEncoder": lambda m, a: m(a.inputs_embeds, _causal(a.inputs_embeds))[-1],
    "CombinedTimestepGuidanceTextProjEmbeddings": lambda m, a: m(a.timestep, a.pooled_projection, a.guidance),
    "AdaLayerNormZeroSingle": lambda m, a: m(a.x, a.emb),
    "GELU": _hidden,
    "FluxPosEmbed": lambda m, a: m(a.ids.astype(int)),
    "FluxAttention": lambda m, a: m(a.hidden_states, a.encoder_hidden_states, _rotary(a)),
    "FluxTransformerBlock": _flux_block,
    "FluxSingleTransformerBlock": _flux_block,
}
# What the tests of each model must have met, so that a renamed class cannot empty the comparison.
UNET_BLOCKS = {
    *("Linear", "Conv2d", "GroupNorm", "LayerNorm", "Timesteps", "TimestepEmbedding", "ResnetBlock2D", "Downsample2D"),
    *("Upsample2D", "Attention", "GEGLU", "FeedForward", "BasicTransformerBlock", "Transformer2DModel", "DownBlock2D"),
    *("CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"),
}
SD3_BLOCKS = {
    *("Conv2d", "Linear", "Timesteps", "TimestepEmbedding", "PixArtAlphaTextProjection", "PatchEmbed", "FeedForward"),
    *("CombinedTimestepTextProjEmbeddings", "AdaLayerNormZero", "AdaLayerNormContinuous", "Attention"),
    "JointTransformerBlock",
}
VAE_BLOCKS = {"Encoder", "Decoder", "DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D", "Attention"}
TEXT_BLOCKS = {"Embedding", "CLIPAttention", "CLIPMLP", "CLIPEncoderLayer", "CLIPEncoder"}
FLUX_BLOCKS = {
    *("Linear", "RMSNorm", "Timesteps", "TimestepEmbedding", "PixArtAlphaTextProjection", "GELU"),
    *("AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous", "FeedForward", "FluxPosEmbed"),
    *("FluxAttention", "FluxTransformerBlock", "FluxSingleTransformerBlock"),
}
