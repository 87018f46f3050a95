"""The layers that every model is built from, with PyTorch's numerics and initial distributions.

The name of a leaf decides how its weights are converted: `kernel` ([in, out] or HWIO), `scale`, `bias`, `embedding`.
`conv()`, and `attention()` in the file beside this one, are the only places that choose a formulation by target and
shape.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax.devices.target import CPU, Target

# im2col beats XLA's CPU convolution when there are few pixels per weight (Stable Diffusion's inner blocks at small
# batches), and loses to it when there are many; measured in docs/performance.md.
IM2COL_MAX_PIXELS = 512


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """PyTorch's default for Linear and Conv2d: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


class DropoutKey(nnx.Variable):
    """The random keys of a dropout layer, uint32 [B, 2], one a sample: state of a training step, never a parameter."""


# Paths of the leaves of an adapter.
LORA_LEAF = re.compile(r"\.lora_[AB]\.kernel$|\.lora\.magnitude$")
# Path of the vectors of new words.
NEW_WORDS = re.compile(r"\.token_embedding\.new$")
LORA_INITS = ("kaiming", "gaussian")


class LoRA(nnx.Module):
    """`scaling * B(A(dropout(x)))`, PEFT's form, with scaling alpha / rank. B is zero at first.

    init: the distribution of A at first, as PEFT's `init_lora_weights` gives it: "kaiming" (True there), uniform in
    +-1/sqrt(din); or "gaussian", normal with standard deviation 1/rank.
    """

    def __init__(
        self, din: int, dout: int, *, rank: int, alpha: float, dropout: float, init: str = "kaiming", rngs: nnx.Rngs
    ):
        self.lora_A = Linear(din, rank, use_bias=False, rngs=rngs)
        if init == "gaussian":
            self.lora_A.kernel[...] = jax.random.normal(rngs.params(), (din, rank)) / rank
        self.lora_B = Linear(rank, dout, use_bias=False, rngs=rngs)
        self.lora_B.kernel[...] = jnp.zeros((rank, dout), jnp.float32)
        self.scaling = alpha / rank
        self.rate = dropout
        self.key = DropoutKey(jax.random.key_data(rngs.params())[None]) if dropout > 0 else nnx.data(None)

    def __call__(self, x: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """What is added to the layer's output for its input x. kernel: the layer's own, which only DoRA reads."""
        del kernel
        return self._low_rank(self._dropped(x))

    def _low_rank(self, x: jax.Array) -> jax.Array:
        return self.lora_B(self.lora_A(x)) * self.scaling

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None:
            return x
        keys = jax.random.wrap_key_data(self.key[...])
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)


class DoRA(LoRA):
    """Weight-decomposed LoRA (Liu et al., 2024) in PEFT's form: the layer computes with m * V / |V|.

    V is W + scaling * B A, and |V| has one norm for each output. The magnitude m [out] is trained, and starts as |W|,
    so that the adapted layer starts equal to its own. As in the paper's section 4.3 and in PEFT, |V| has no gradient.
    Under dropout the part that is added reads the dropped input whole, as in PEFT. An output whose weights are all zero
    keeps its scale (PEFT divides by zero).
    """

    def __init__(self, kernel: jax.Array, **options):
        super().__init__(*kernel.shape, **options)
        self.magnitude = nnx.Param(output_norms(kernel))

    def __call__(self, x: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        assert kernel is not None
        x = self._dropped(x)
        change = self.scaling * (self.lora_A.kernel[...].astype(jnp.float32) @ self.lora_B.kernel[...])
        norms = jax.lax.stop_gradient(output_norms(kernel.astype(jnp.float32) + change))
        share = jnp.where(norms > 0, self.magnitude[...] / jnp.where(norms > 0, norms, 1), 1)
        return ((share - 1) * (x @ kernel) + share * self._low_rank(x)).astype(x.dtype)


def output_norms(kernel: jax.Array) -> jax.Array:
    """The norm of the weights of each output of a linear layer: kernel [in, out] -> float32 [out]."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(0))


def scaled_to(kernel: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """A kernel [..., in, out] whose weights of each output have the norm `magnitude` [out]: DoRA, merged.

    With a magnitude [in, 1] those of each input have it. Weights of norm zero stay.
    """
    axes = (*range(kernel.ndim - 2), -2 if magnitude.ndim == 1 else -1)
    norms = np.sqrt(np.square(kernel).sum(axes, keepdims=True))
    return kernel * np.where(norms > 0, magnitude / np.where(norms > 0, norms, 1), 1).astype(kernel.dtype)


class Linear(nnx.Module):
    """y = x @ kernel + bias, kernel [in, out]; `lora` is None or an adapter added to the output."""

    def __init__(self, din: int, dout: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_uniform(rngs, (din, dout), din))
        self.bias = nnx.Param(_uniform(rngs, (dout,), din)) if use_bias else nnx.data(None)
        self.lora: LoRA | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora is not None:
            y = y + self.lora(x, self.kernel[...])
        return y


class Conv(nnx.Module):
    """2-D convolution, NHWC, kernel HWIO. `padding` is ((top, bottom), (left, right)) or one number for all."""

    def __init__(
        self, cin: int, cout: int, size: int = 3, *, stride: int = 1, padding=1, use_bias: bool = True, rngs: nnx.Rngs
    ):
        fan_in = cin * size * size
        self.kernel = nnx.Param(_uniform(rngs, (size, size, cin, cout), fan_in))
        self.bias = nnx.Param(_uniform(rngs, (cout,), fan_in)) if use_bias else nnx.data(None)
        self.stride = stride
        self.padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        self.target = CPU

    def __call__(self, x: jax.Array) -> jax.Array:
        y = conv(x, self.kernel[...], self.stride, self.padding, self.target)
        return y if self.bias is None else y + self.bias[...]


def conv(x: jax.Array, kernel: jax.Array, stride: int, padding, target: Target = CPU) -> jax.Array:
    """x [B, H, W, C], kernel HWIO -> [B, H', W', O]. A 1x1 convolution is a matrix product everywhere."""
    size = kernel.shape[0]
    if size == 1 and stride == 1 and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    if target.platform == "cpu" and x.shape[0] * x.shape[1] * x.shape[2] <= IM2COL_MAX_PIXELS:
        return _im2col_conv(x, kernel, stride, padding)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _im2col_conv(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    kh, kw, cin, cout = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    patches = [
        x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(kh * kw * cin, cout)


class GroupNorm(nnx.Module):
    """Group normalisation in float32 as one affine map per (sample, channel), cheaper than normalising in place."""

    def __init__(self, groups: int, channels: int, *, eps: float, rngs: nnx.Rngs):
        del rngs
        if channels % groups:
            raise ValueError(f"GroupNorm: {channels} channels are not divisible by norm_num_groups={groups}.")
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, channels = x.shape[0], x.shape[-1]
        x32 = x.astype(jnp.float32)
        grouped = x32.reshape(batch, -1, self.groups, channels // self.groups)
        mean = grouped.mean((1, 3), keepdims=True)
        var = jnp.square(grouped - mean).mean((1, 3))
        scale = self.scale[...].astype(jnp.float32).reshape(self.groups, -1) * jax.lax.rsqrt(var + self.eps)[..., None]
        shift = self.bias[...].astype(jnp.float32).reshape(self.groups, -1) - mean[:, 0] * scale
        ones = (1,) * (x.ndim - 2)
        affine = x32 * scale.reshape(batch, *ones, channels) + shift.reshape(batch, *ones, channels)
        return affine.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, computed in float32."""

    def __init__(self, channels: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        var = jnp.square(x32 - mean).mean(-1, keepdims=True)
        normed = (x32 - mean) * jax.lax.rsqrt(var + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, without subtracting the mean, computed in float32."""

    def __init__(self, channels: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.ones(channels))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table, [entries, channels]. `new` is None, or further rows [n, channels] that are trained alone."""

    def __init__(self, entries: int, channels: int, *, stddev: float = 0.02, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (entries, channels)) * stddev)
        self.new: nnx.Param | None = nnx.data(None)

    def __call__(self, ids: jax.Array) -> jax.Array:
        table = self.embedding[...]
        if self.new is None:
            return table[ids]
        last = len(table) - 1
        added = self.new[...][jnp.maximum(ids - len(table), 0)]
        return jnp.where((ids > last)[..., None], added, table[jnp.minimum(ids, last)])


class Identity(nnx.Module):
    """Stands where PyTorch has a parameterless layer, so that list positions match (`ff.net.2`)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def timestep_embedding(timesteps: jax.Array, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> jax.Array:
    """Sinusoidal features of timesteps [B] -> [B, dim] float32 (diffusers' `get_timestep_embedding`)."""
    half = dim // 2
    exponent = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)


class TimestepEmbedding(nnx.Module):
    """linear_1, SiLU, linear_2."""

    def __init__(self, din: int, dim: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(din, dim, rngs=rngs)
        self.linear_2 = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """norm1, conv1, (+ time), norm2, conv2, residual. `temb_channels=None` for the VAE."""

    def __init__(
        self, cin: int, cout: int, *, temb_channels: int | None = None, groups: int, eps: float, rngs: nnx.Rngs
    ):
        self.norm1 = GroupNorm(groups, cin, eps=eps, rngs=rngs)
        self.conv1 = Conv(cin, cout, rngs=rngs)
        self.time_emb_proj = nnx.data(None) if temb_channels is None else Linear(temb_channels, cout, rngs=rngs)
        self.norm2 = GroupNorm(groups, cout, eps=eps, rngs=rngs)
        self.conv2 = Conv(cout, cout, rngs=rngs)
        self.conv_shortcut = nnx.data(None) if cin == cout else Conv(cin, cout, 1, padding=0, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            h = h + self.time_emb_proj(jax.nn.silu(temb))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Stride-2 convolution; the VAE pads only on the right and bottom."""

    def __init__(self, channels: int, *, padding, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour doubling, cropped to `size` (H, W) where the halving had rounded up, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, ...] | None = None) -> jax.Array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x[:, :height, :width])
