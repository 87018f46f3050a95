"""ESD, Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023): learn the negatively guided prediction."""

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import loop, negative_guidance
from spqr_jax.methods.tools.concepts import checked
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.negative_guidance import Course
from spqr_jax.methods.tools.parts import trained
from spqr_jax.pipeline import Pipeline


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    method: str = "esd-u",
    steps: int = 1000,
    lr: float = 1e-5,
    eta: float = 1.0,
    batch_size: int = 1,
    sampling_steps: int = 50,
    sampling_guidance: float = 3.0,
    progress: bool = False,
) -> Pipeline:
    """Train the conditional prediction towards the frozen model's prediction pushed away from the concept.

    Loss (paper eq. 7): mean squared error of eps(x_t, c, t) and eps*(x_t, t) - eta (eps*(x_t, c, t) - eps*(x_t, t)),
    eps* frozen; the same affine combination holds for velocity prediction. x_t: the student's own guided DDIM sample
    down to a random step k of `sampling_steps`, t uniform within that step, as in the 2023 code. (That code drops the
    noisiest step, so its x_t is two to three steps cleaner than t; here x_t and t agree.) Each sample draws one of the
    concept's texts. Defaults are the authors' for nudity on SD1.x; Adam without decay.

    SDXL: the authors' 2025 code has "esd-x" at lr 2e-4 for 200 steps, guidance 2, and a target that equals eta = 0
    here (their eta counts one more); its "esd-u" (lr 1e-5) leaves out norms and layers outside the blocks, ours does
    not. Here x_t is DDIM's in SDXL too, not the scaled Euler sample.

    SD3: "esd-x" trains the linear layers of joint attention, as the authors' code does in FLUX (lr 1e-4, and their eta
    counts one more). x_t is the flow sampler's, and t its own time there.

    FLUX: a fork of the authors' code has esd_flux.py, "esd-x" at lr 1e-4 for 1400 steps, samples of 28 steps with
    guidance 3.5 at 512 x 512, and the target of SDXL. As there, dev is told guidance 1 in the loss.
    """
    checked(concept, pipeline)
    backbone = backbones.of(pipeline)
    weights = backbone.weights(pipeline)
    train, _ = params_lib.partition(weights, trained(backbone, weights, method))
    course = Course(seed, steps, eta, batch_size, sampling_steps, sampling_guidance, progress)
    tuned = negative_guidance.fit(method, pipeline, concept, params_lib.merge, weights, train, Adam(lr), course)
    return backbone.with_weights(pipeline, loop.on_host(params_lib.merge(weights, tuned)))


METHOD = Method("esd", "ESD", align)
