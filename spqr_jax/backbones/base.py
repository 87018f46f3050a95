"""The interface of an architecture: a `Backbone`, and the values that pass between it and its callers."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax.backbones.noising import Drawn, Noising
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.schedulers import SPACED, Spacing

Array = jax.Array | np.ndarray


class Condition(NamedTuple):
    """The inputs of a denoiser beside latents and time, with one row for each text or image.

    Attributes:
        context: text states [N, L, E], read by cross-attention. If the text encoders are trained together with the
            denoiser (`Denoiser.encoders`), token ids int32 [N, encoders, L] instead.
        pooled: pooled text states [N, P], or None where the backbone has none.
        time_ids: float32 [N, 6], original height and width, top and left of the crop, target height and width, all in
            pixels; or None where the backbone does not read sizes.
        guidance: float32 [N], the scale of guidance that a guidance-distilled denoiser reads; or None for the others.
    """

    context: Array
    pooled: Array | None = None
    time_ids: Array | None = None
    guidance: Array | None = None

    def rows(self, index: Any) -> "Condition":
        """The rows that a NumPy index chooses."""
        return jax.tree.map(lambda field: field[index], self)

    def guided(self, scales: Array | None) -> "Condition":
        """The same texts under these scales of guidance [N], if the denoiser reads any."""
        return self if scales is None else self._replace(guidance=scales)


# (latents [B, h, w, C], times [B], Condition) -> prediction [B, h, w, C]: a denoiser with its weights.
Predict = Callable[[Array, Array, Condition], jax.Array]


class Regions(NamedTuple):
    """Parts of a denoiser that methods and profiles name, each as a pattern over the paths of its parameters.

    A part that an architecture does not have is None. `Backbone.require` refuses a method that needs it.

    Attributes:
        key_value: kernels that turn text states into keys and values; in joint attention, the kernel that all of them
            read the states through.
        pooled: kernels that read the pooled text state, edited beside `key_value` by closed-form methods; None where
            these leave it alone.
        cross_attention: every parameter of the layers that read the text; in joint attention, its linear layers.
        cross_attention_projections: the parameters of those layers that the profile "moderate" trains (the paper's
            section 4.1).
        lora: kernels that receive an adapter under the profile "lite" (Table C).
        lora_text: further kernels that receive one by option, of text tokens in joint attention.
        frame: layers outside the blocks. They embed the time and form the output.
        transformer: kernels of all linear layers and 1x1 convolutions of the attention blocks.
        reset: attention layers that Scissorhands draws anew.
        buffers: leaves that are no parameters. Nothing trains them.
    """

    key_value: re.Pattern | None = None
    pooled: re.Pattern | None = None
    cross_attention: re.Pattern | None = None
    cross_attention_projections: re.Pattern | None = None
    lora: re.Pattern | None = None
    lora_text: re.Pattern | None = None
    frame: re.Pattern | None = None
    transformer: re.Pattern | None = None
    reset: re.Pattern | None = None
    buffers: re.Pattern | None = None


class Lengths(NamedTuple):
    """Tokens of a text for an encoder of any length (T5): the usual number, and the most that diffusers takes."""

    usual: int
    most: int


class TextEncoding(NamedTuple):
    """The text encoders of an architecture as parts of a training step; hashable.

    Attributes:
        encoders: their components.
        lora: kernels of an encoder that receive an adapter if the profile "lite" trains it.
        states: (bound encoders, token ids int32 [B, encoders, L]) -> text states [B, L, E], and pooled text states
            [B, P] or None.
    """

    encoders: tuple[str, ...]
    lora: re.Pattern
    states: Callable[[list[Any], Array], tuple[jax.Array, jax.Array | None]]


def classifier_free(pipeline: Pipeline, scales: np.ndarray) -> tuple[None, np.ndarray]:
    """Guidance by two predictions, of the text and of no text. At scale 1 and below there is none, as in diffusers."""
    del pipeline
    return None, np.maximum(scales, 1)


def last_words(pipeline: Pipeline, text: str) -> tuple[int, ...]:
    """The position of a text's last word token under CLIP; 0 (start of text) when it has none."""
    return (max(len(pipeline.tokenizers["tokenizer"](text).input_ids) - 2, 0),)


class Backbone(NamedTuple):
    """One architecture; hashable, static under `jax.jit`. `spqr_jax.backbones.of` finds the backbone of a pipeline.

    Attributes:
        key: a short name, as methods list it.
        name: its name in messages.
        pipeline_class: diffusers' class of such pipelines.
        components: names of the pipeline's parts that have weights; a pipeline with exactly these is of this kind.
        optional: those among them that a pipeline may lack.
        denoiser: the component that denoises.
        denoiser_class: the class of its model, where backbones differ in nothing else; None where it says nothing.
        autoencoder: the component that turns images into latents and back.
        noising: the noising process of its training: drawing a time, mixing latents with noise, forming the target.
        regions: the parts of the denoiser that methods and profiles name.
        condition: (pipeline, texts, size, unconditional=()) -> Condition of N texts for images of `size` (height,
            width) pixels. `unconditional` holds the numbers of the rows that stand for no prompt in classifier-free
            guidance. Some backbones have zeros there instead of the encoding of "".
        resized: (Condition, size) -> the same texts for images of another size.
        cropped: (Condition of N texts, geometry) -> the same texts for images that were resized and cropped. geometry
            is int [N, 4], the original height and width and the top and left of the crop (`spqr_jax.data.Dataset`).
        predict: (model, latents [B, h, w, C], times [B], Condition) -> prediction [B, h, w, C] of a bound denoiser.
        factor: pipeline -> pixels per latent along one side.
        side: pipeline -> side in pixels of the square images that the denoiser was trained on.
        latent_shape: (pipeline, size) -> (h, w, C) of the latents of an image of `size` pixels.
        scaling: pipeline -> the scaling of the autoencoder's latents, for `scaled` and `decode`; hashable.
        encode: (autoencoder model, images_u8 [B, H, W, 3]) -> mean and log-variance [B, h, w, C], not scaled.
        scaled: (mean, logvar, scaling) -> mean and standard deviation of the scaled latents, float32. The denoiser is
            trained on these.
        decode: (autoencoder model, latents, scaling) -> pixels float32 [B, H, W, 3] in -1..1.
        text: the text encoders as parts of a training step, or None where they cannot be trained.
        patch: pipeline -> latents along one side that the denoiser reads as one token. Sides of images are multiples of
            `factor` times this.
        spacing: (pipeline, size) -> what the pipeline adds to its scheduler's config for images of `size` pixels.
        sampler: the deterministic scheduler that methods sample with.
        last_words: (pipeline, text) -> positions in the text states of the text's last word, one for each encoder.
        lengths: the lengths of text that may be chosen (`Pipeline.text_length`), or None where the length is fixed.
        guidance: (pipeline, scales float32 [N]) -> the scales [N] that the denoiser reads (`Condition.guidance`) or
            None, and those [N] of classifier-free guidance, at least 1. Raises ValueError for a scale that it has not.
    """

    key: str
    name: str
    pipeline_class: str
    components: tuple[str, ...]
    denoiser: str
    autoencoder: str
    noising: Noising
    regions: Regions
    condition: Callable[..., Condition]
    resized: Callable[[Condition, tuple[int, int]], Condition]
    cropped: Callable[[Condition, np.ndarray], Condition]
    predict: Callable[[Any, Array, Array, Condition], jax.Array]
    factor: Callable[[Pipeline], int]
    side: Callable[[Pipeline], int]
    latent_shape: Callable[[Pipeline, tuple[int, int]], tuple[int, int, int]]
    scaling: Callable[[Pipeline], Any]
    encode: Callable[[Any, Array], tuple[jax.Array, jax.Array]]
    scaled: Callable[[np.ndarray, np.ndarray, Any], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[Any, jax.Array, Any], jax.Array]
    text: TextEncoding | None = None
    optional: tuple[str, ...] = ()
    denoiser_class: str | None = None
    patch: Callable[[Pipeline], int] = lambda _: 1
    spacing: Callable[[Pipeline, tuple[int, int]], Spacing] = lambda *_: SPACED
    sampler: str = "ddim"
    last_words: Callable[[Pipeline, str], tuple[int, ...]] = last_words
    lengths: Lengths | None = None
    guidance: Callable[[Pipeline, np.ndarray], tuple[np.ndarray | None, np.ndarray]] = classifier_free

    def multiple(self, pipeline: Pipeline) -> int:
        """The number of pixels that sides of images are multiples of."""
        return self.factor(pipeline) * self.patch(pipeline)

    def with_length(self, pipeline: Pipeline, length: int | None) -> Pipeline:
        """The pipeline with texts of so many tokens; None changes nothing. Raises ValueError for another number."""
        if length is None:
            return pipeline
        if self.lengths is None:
            raise ValueError(f"max_sequence_length is the length of T5's texts, which {self.name} does not have.")
        if not 1 <= length <= self.lengths.most:
            raise ValueError(f"max_sequence_length must lie in 1..{self.lengths.most}, found {length}.")
        return pipeline._replace(text_length=length)

    def pixels(self, pipeline: Pipeline, latents: Array) -> tuple[int, int]:
        """Height and width in pixels of the images of latents [N, h, w, C]."""
        factor = self.factor(pipeline)
        return latents.shape[1] * factor, latents.shape[2] * factor

    def weights(self, pipeline: Pipeline) -> Params:
        """The denoiser's weights."""
        return pipeline.params[self.denoiser]

    def with_weights(self, pipeline: Pipeline, weights: Params) -> Pipeline:
        """The pipeline with other weights of the denoiser."""
        return pipeline.with_params(**{self.denoiser: weights})

    def by_component(self, leaves: Params) -> dict[str, Params]:
        """Leaves of the denoiser alone, or beside those of text encoders under their components' names: split."""
        names = [name for name in (self.text.encoders if self.text else ()) if name in leaves]
        own = {key: tree for key, tree in leaves.items() if key not in names}
        return {self.denoiser: own} | {name: leaves[name] for name in names}

    def require(self, region: str, method: str) -> re.Pattern:
        """The pattern of a region. Raises ValueError naming backbone and method if the backbone lacks the region."""
        pattern = getattr(self.regions, region)
        if pattern is None:
            raise ValueError(
                f"{method} needs the region {region!r} of the denoiser, which {self.name} does not have; choose "
                "another method, or another backbone."
            )
        return pattern


class Denoiser(NamedTuple):
    """A pipeline's denoiser without its weights; hashable, static under `jax.jit`.

    Attributes:
        backbone: its architecture.
        definition: the model without weights, together with the adapters that were attached to it.
        prediction: the kind of its prediction, "epsilon", "v_prediction" or "flow".
        encoders: the text encoders that are trained with it (`Backbone.text`), or none. With them the weights hold
            theirs too, each under the name of its component, and a Condition holds token ids in the place of states.
    """

    backbone: Backbone
    definition: Definition
    prediction: str
    encoders: tuple[Definition, ...] = ()

    def bind(self, weights: Params) -> Predict:
        """A function (latents, times, Condition) -> prediction. Cheap: call it inside a jitted function."""
        if not self.encoders:
            return self.of_model(self.definition.bind(weights))
        assert self.backbone.text is not None
        own, *of_encoders = self.backbone.by_component(weights).values()
        models = [encoder.bind(each) for encoder, each in zip(self.encoders, of_encoders, strict=True)]
        states, predict = self.backbone.text.states, self.of_model(self.definition.bind(own))

        def encoded(latents: Array, times: Array, condition: Condition) -> jax.Array:
            context, pooled = states(models, condition.context)
            return predict(latents, times, condition._replace(context=context, pooled=pooled))

        return encoded

    def of_model(self, model: Any) -> Predict:
        """As `bind`, for a model that has its weights already."""
        return lambda latents, times, condition: self.backbone.predict(model, latents, times, condition)

    def draw(self, key: jax.Array, mean: Array, std: Array, schedule: jax.Array) -> Drawn:
        """Latents ~ N(mean, std^2), noise and times of a training step."""
        return self.backbone.noising.draw(key, mean, std, schedule)

    def mix(self, schedule: jax.Array, drawn: Drawn) -> jax.Array:
        """The drawn latents mixed with the drawn noise, [B, h, w, C]."""
        return self.backbone.noising.mix(schedule, drawn.latents, drawn.noise, drawn.times)

    def with_definition(self, definition: Definition) -> "Denoiser":
        """The same denoiser with layers added to or taken from its model."""
        return self._replace(definition=definition)
