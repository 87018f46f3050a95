"""Methods on SD3: UCE against its authors' algebra for flow transformers in PyTorch, ESD's loss against diffusers."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from spqr_jax import methods
from spqr_jax.sampling import partial
from tests import flow_reference
from tests.methods import flow
from tests.methods.flow import CONCEPT, LENGTH

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "without_t5"])
def saved(request, tmp_path_factory):
    pipe, folder = flow_reference.sd3("sd35", with_t5=request.param), tmp_path_factory.mktemp("sd3")
    pipe.save_pretrained(folder)
    return pipe, convert.load(folder)._replace(text_length=LENGTH)


def encoded(pipe, texts):
    """(text states, pooled states) by diffusers."""
    with torch.no_grad():
        found = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    return found[0], found[2]


def test_uce_edits_what_reads_the_text(saved):
    pipe, pipeline = saved

    def states(text):
        context, pooled = encoded(pipe, text)
        last = [len(pipe.tokenizer(text).input_ids) - 2]
        if pipe.tokenizer_3 is not None:
            last.append(77 + int(sum(pipe.tokenizer_3(text).attention_mask)) - 2)
        return context[0, last], pooled

    flow.check_uce(pipe, pipeline, states)


def test_uce_of_2023_is_refused(saved):
    with pytest.raises(ValueError, match='variant "v2" alone'):
        methods.METHODS["uce"].align(saved[1], CONCEPT)


def test_times_of_partly_sampled_latents_are_the_samplers_own(saved):
    sampler = partial.sampler(saved[1], 4, 3.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    times = [sampler.times(k, 1, np.random.default_rng(0))[0] for k in range(4)]
    np.testing.assert_array_equal(times, scheduler.timesteps.numpy()[::-1])


def test_the_loss_of_esd(saved):
    """For the same latents and time, with the target of the frozen transformer of diffusers."""
    pipe, pipeline = saved
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 16)).astype(np.float32)
    times = np.float32([880.5, 100.25])

    def predict(texts):
        with torch.no_grad():
            x = torch.tensor(latents.transpose(0, 3, 1, 2))
            return pipe.transformer(x, *encoded(pipe, texts), torch.tensor(times)).sample.permute(0, 2, 3, 1)

    flow.check_loss_of_esd(pipe, pipeline, latents, times, predict)


@pytest.mark.parametrize("name", flow.SMALL)
def test_methods_change_their_region_and_nothing_else(saved, name):
    if "text_encoder_3" in saved[1].params:
        pytest.skip("once is enough")
    found, region = flow.changed_by(saved[1], name)
    # The last block hands no text tokens on: nothing that only they are made from has an effect.
    assert found <= region and len(found) >= len(region) - 2


@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"none", "uce", "sld", *flow.REGION}))
def test_other_methods_are_refused_in_one_line(saved, name):
    flow.check_refused(saved[1], name, r"Stable Diffusion 3 or 3\.5")
