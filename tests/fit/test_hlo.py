"""What a program consists of: in real programs on this machine's CPU, and in lines that other compilers wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.backbones.models import attention
from spqr_jax.fit import hlo, table


def shape(*axes: int, dtype=np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, dtype)


def counted(function, *shapes) -> dict:
    lowered = jax.jit(function).trace(*shapes).lower()
    return hlo.counts(lowered, lowered.compile())


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_products_by_type_with_their_flop():
    def program(x, w, image, kernel):
        half = (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).sum()
        return half, x @ w, convolved(image, kernel)

    found = counted(program, shape(3, 5), shape(5, 7), shape(2, 8, 8, 3), shape(3, 3, 3, 4))["products"]
    assert found["bf16"] == {
        "product": 1,
        "convolution": 0,
        "flop": 2 * 3 * 5 * 7,
        "largest": "product of [3, 5] with [5, 7], 210 FLOP",
    }
    assert (found["f32"]["product"], found["f32"]["convolution"]) == (1, 1)
    assert found["f32"]["flop"] == 2 * 3 * 5 * 7 + 2 * (2 * 8 * 8 * 4) * (3 * 3 * 3)
    assert found["f32"]["largest"].startswith("convolution of [2, 8, 8, 3] with [3, 3, 3, 4]")


def test_a_product_of_mixed_types_counts_as_float32():
    mixed = lambda x, w: jax.lax.dot(x, w, preferred_element_type=jnp.float32)  # noqa: E731
    assert list(counted(mixed, shape(4, 4, dtype=jnp.bfloat16), shape(4, 4))["products"]) == ["f32"]


def test_what_a_function_does_counts_at_each_call_and_a_loop_once():
    @jax.jit
    def squared(x):
        return x @ x

    def program(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), squared(squared(x)), None, length=7)[0]

    assert counted(program, shape(4, 4))["products"]["f32"]["product"] == 3


HALF = [shape(2, length, 2, 16, dtype=jnp.bfloat16) for length in (64, 77, 77)]


def test_plain_attention_by_its_queries_and_keys():
    assert counted(attention.plain, *HALF)["plain"] == [{"queries": 64, "keys": 77, "number": 1}]
    twice = counted(lambda q, k, v: attention.plain(q, k, v) + attention.plain(q, q, q), *HALF)["plain"]
    assert twice == [{"queries": 64, "keys": keys, "number": 1} for keys in (77, 64)]


def test_a_loop_over_queries_shows_those_of_one_turn(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_MAX_QUERIES", 16)
    assert counted(attention.blockwise, *HALF)["plain"] == [{"queries": 16, "keys": 77, "number": 1}]
    monkeypatch.setattr(attention, "QUERY_CHUNK", 32)
    assert counted(attention.mapped, *HALF)["plain"] == [{"queries": 32, "keys": 77, "number": 1}]


def test_activations_are_not_taken_for_attention():
    found = counted(lambda x, w: jax.nn.silu(x @ w) @ w + jax.nn.gelu(x) @ w, shape(8, 8), shape(8, 8))
    assert found["plain"] == [] and found["flash"] == {"forward": 0, "backward": 0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_attention_in_half_precision_has_no_float32_product_even_backwards(dtype):
    def loss(q, k, v):
        return attention.plain(q, k, v).astype(jnp.float32).sum()

    shapes = [shape(*x.shape, dtype=dtype) for x in HALF]
    found = counted(jax.value_and_grad(loss, argnums=(0, 1, 2)), *shapes)
    assert list(found["products"]) == [{"bfloat16": "bf16", "float32": "f32"}[dtype]]
    assert found["products"].popitem()[1]["product"] == 6


def test_donated_arguments():
    def step(state, x):
        return jax.tree.map(lambda leaf: leaf + x, state)

    shapes = {"a": shape(4), "b": shape(2, 2), "c": shape()}, shape()
    for donated, expected in ((0, 3), ((), 0)):
        lowered = jax.jit(step, donate_argnums=donated).trace(*shapes).lower()
        assert hlo.counts(lowered, lowered.compile())["donated"] == expected


def test_a_transpose_and_its_bytes():
    found = counted(lambda x: jnp.tanh(x).transpose(2, 0, 1) + 1, shape(8, 16, 32))
    assert found["transposes"]["number"] + found["copies"]["number"] >= 1
    assert found["transposes"]["bytes"] + found["copies"]["bytes"] >= 8 * 16 * 32 * 4


# Lines of compilers for H100 (jaxlib 0.10.2) and TPU v5e (libtpu 0.0.52), shortened where the attributes go on.
HEAD = "HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }, entry={}\n"
CUDNN = """
  %dot_product_attention_fwd.10 = (bf16[8,8,4096,40]{3,1,2,0}, f32[8,8,4096]{2,1,0}, u8[0]{0}) custom-call(%bitcast.25.0, %bitcast.26.0, %bitcast.27.0), custom_call_target="__cudnn$fmhaSoftmax", api_version=1
  %dot_product_attention_bwd.16 = (bf16[8,8,4096,40]{3,1,2,0}, bf16[8,8,80,40]{3,1,2,0}, u8[0]{0}) custom-call(%bitcast.223.0, /*index=5*/%bitcast.100.0), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %cudnn-conv-bw-input.2 = (bf16[8,64,64,320]{3,2,1,0}, u8[0]{0}) custom-call(%get-tuple-element.68), custom_call_target="__cudnn$convBackwardInput"
  ROOT %transpose.24.1 = bf16[320,3,3,320]{3,2,1,0} transpose(%param_0.454), dimensions={3,0,1,2}
"""  # noqa: E501
TPU = """
  %flash_attention.1 = bf16[8,8,4096,40]{3,2,1,0:T(8,128)(2,1)} custom-call(%a, %b, %c), custom_call_target="tpu_custom_call"
  %flash_mha_bwd_dkv_block_q_512.1 = (bf16[8,8,4096,40]{3,2,1,0:T(8,128)(2,1)}, bf16[8,8,4096,40]{3,2,1,0:T(8,128)(2,1)}) custom-call(%a), custom_call_target="tpu_custom_call"
  %flash_mha_bwd_dq_block_q_512.1 = bf16[8,8,4096,40]{3,2,1,0:T(8,128)(2,1)} custom-call(%a), custom_call_target="tpu_custom_call"
  %custom-call.3 = bf16[8]{0} custom-call(%a), custom_call_target="ConcatBitcast"
  %p.1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather-start.1 = (bf16[16,32]{1,0:T(8,128)(2,1)}, bf16[64,32]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p.1), channel_id=3, dimensions={0}
  %all-gather-start.7 = (bf16[16,32]{1,0:T(8,128)(2,1)}, bf16[64,32]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p.1), channel_id=3, dimensions={0}
  %all-gather-done.1 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%all-gather-start.1)
  %all-reduce.35 = (bf16[320]{0:T(512)(128)(2,1)S(1)}, /*index=5*/bf16[3,3,320,320]{3,2,1,0:T(8,128)(2,1)}) all-reduce(%x, %y), channel_id=2, to_apply=%sum
  %reduce-scatter.2 = f32[4,32]{1,0} reduce-scatter(%big), dimensions={0}
"""  # noqa: E501


def test_lines_of_the_compiler_for_nvidia():
    found = hlo.of_compiled(HEAD + CUDNN)
    assert found["flash"] == {"forward": 1, "backward": 1} and found["donated"] == 2
    assert found["transposes"] == {"number": 1, "bytes": 2 * 320 * 3 * 3 * 320} and found["collectives"] == {}


def test_lines_of_the_compiler_for_tpus():
    found = hlo.of_compiled(HEAD + "  %big = f32[16,32]{1,0} parameter(1)\n" + TPU)
    assert found["flash"] == {"forward": 1, "backward": 1}
    assert found["collectives"] == {
        "all-reduce": {"number": 1, "bytes": 2 * (320 + 3 * 3 * 320 * 320)},
        "all-gather": {"number": 1, "bytes": 2 * 64 * 32},
        "reduce-scatter": {"number": 1, "bytes": 4 * 16 * 32},
    }


def test_the_line_of_a_program_in_the_table():
    consists = hlo.of_compiled(HEAD + CUDNN) | {
        "plain": [{"queries": 256, "keys": 256, "number": 3}, {"queries": 64, "keys": 77, "number": 1}],
        "products": {"bf16": {"flop": 99.0}, "f32": {"flop": 1.0, "largest": "product of [1, 2] with [2, 3], 1 FLOP"}},
    }
    assert ", ".join(table._consists(consists, "bfloat16")) == (
        "flash attention 1 forward, 1 backward, plain attention 4, at most 256 queries of 256 keys, left in float32: "
        "0.01 of the FLOP (product of [1, 2] with [2, 3], 1 FLOP), transposes 1, copies 0, donated arguments 2"
    )
