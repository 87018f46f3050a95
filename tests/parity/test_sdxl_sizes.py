"""The sizes that SDXL reads in fine-tuning, against diffusers' examples/text_to_image/train_text_to_image_sdxl.py.

The script's preprocessing is written out here with Pillow, to which torchvision's transforms hand PIL images. The
script is that of January 2024 and later. Before, it mirrored an image after its crop, and noted a corner that the crop
did not have. What is random is found by search: the flip and the corner with which the script makes the pixels that we
train on.
"""

import json

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from spqr_jax import backbones, data
from spqr_jax.training import latents
from spqr_jax.training.objective import denoising_loss

jax.config.update("jax_default_matmul_precision", "highest")
SIDE = 16
SIZES = [(24, 40), (40, 24), (16, 30), (33, 20), (16, 16), (90, 50)]  # height and width; 40/24 and 33/20 round down
ROWS, PASSES = np.array([0, 1, 2, 3, 4, 5, 0, 2]), np.array([0, 0, 0, 0, 0, 0, 1, 1])


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def dataset(images, tmp_path_factory) -> data.Dataset:
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"the dog eats {i} cats")
    return data.load(f"folder:{folder}", len(SIZES), side=SIDE, seed=3, crop="random", flip=True, order="file")


def script(array: np.ndarray, flip: bool, y1: int, x1: int) -> tuple[np.ndarray, list[int]]:
    """(pixels, time ids) of `preprocess_train` and `compute_time_ids`, for what they draw at random."""
    image = Image.fromarray(array)
    original_size = (image.height, image.width)
    image = resize(image)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.crop((x1, y1, x1 + SIDE, y1 + SIDE))
    return np.asarray(image), [*original_size, y1, x1, SIDE, SIDE]


def resize(image: Image.Image) -> Image.Image:
    """torchvision's Resize(SIDE): the shorter side becomes SIDE, the longer one is rounded down."""
    short, long = sorted(image.size)
    longer = int(SIDE * long / short)
    size = (SIDE, longer) if image.width <= image.height else (longer, SIDE)
    return image.resize(size, Image.Resampling.BILINEAR)


def searched(array: np.ndarray, shown: np.ndarray) -> list[tuple[bool, list[int]]]:
    """(flip, time ids) of every draw of the script that gives the pixels `shown`."""
    width, height = resize(Image.fromarray(array)).size
    draws = [
        (flip, y1, x1) for flip in (False, True) for y1 in range(height - SIDE + 1) for x1 in range(width - SIDE + 1)
    ]
    made = [(flip, *script(array, flip, y1, x1)) for flip, y1, x1 in draws]
    return [(flip, ids) for flip, pixels, ids in made if np.array_equal(pixels, shown)]


@pytest.fixture(scope="module")
def drawn_by_the_script(images, dataset) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [B, H, W, 3], time ids [B, 6]) of the batch, as the script makes them."""
    pixels = np.concatenate([dataset.of_pass(p).images(np.array([r])) for r, p in zip(ROWS, PASSES, strict=True)])
    found = [searched(images[row], shown) for row, shown in zip(ROWS, pixels, strict=True)]
    assert {len(draws) for draws in found} == {1}, "one draw makes each image"
    assert {flip for ((flip, _),) in found} == {False, True}
    ids = np.array([ids for ((_, ids),) in found])
    assert (ids[:, 2] > 0).any() and (ids[:, 3] > 0).any() and (ids[0] != ids[6]).any()
    return pixels, ids


def test_time_ids_of_a_batch(reference, dataset, drawn_by_the_script):
    pipeline = convert.load(reference("sdxl")[1])
    condition = our_condition(pipeline, dataset)
    assert condition.time_ids.dtype == np.float32
    np.testing.assert_array_equal(condition.time_ids, drawn_by_the_script[1])


def our_condition(pipeline, dataset: data.Dataset) -> backbones.Condition:
    texts = backbones.condition(pipeline, dataset.captions, size=(SIDE, SIDE)).rows(ROWS)
    return backbones.of(pipeline).cropped(texts, dataset.geometries(ROWS, PASSES))


def test_a_training_loss_with_these_sizes(reference, dataset, drawn_by_the_script):
    """Images, latents, texts, sizes and loss of diffusers; only noise and times are ours."""
    pipe, directory = reference("sdxl")
    pipeline = convert.load(directory)
    denoiser, schedule = backbones.denoiser(pipeline), backbones.schedule(pipeline)
    predict = denoiser.bind(denoiser.backbone.weights(pipeline))
    mean, std = latents.Encoded(pipeline, dataset, [data.Batch(ROWS, PASSES)]).batch(0).scaled(pipeline)
    drawn = denoiser.draw(jax.random.key(0), mean, 0 * std, schedule)

    def loss(condition):
        return float(denoising_loss(denoiser, predict, condition, drawn, schedule))

    condition = our_condition(pipeline, dataset)
    ours, theirs = loss(condition), torch_loss(pipe, dataset, *drawn_by_the_script, drawn)
    constant = loss(condition._replace(time_ids=np.tile(np.float32([SIDE, SIDE, 0, 0, SIDE, SIDE]), (len(ROWS), 1))))
    assert ours == pytest.approx(theirs, rel=2e-6)
    assert abs(constant - theirs) > 1e-4 * theirs, "the loss must see sizes"


def torch_loss(pipe, dataset: data.Dataset, pixels: np.ndarray, time_ids: np.ndarray, drawn) -> float:
    ddpm = diffusers.DDPMScheduler.from_config(json.loads(pipe.scheduler.to_json_string()))
    noise, t = torch.tensor(np.asarray(drawn.noise)).permute(0, 3, 1, 2), torch.tensor(np.asarray(drawn.times))
    captions = [dataset.captions[row] for row in ROWS]
    with torch.no_grad():
        images = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        model_input = pipe.vae.encode(images).latent_dist.mean * pipe.vae.config.scaling_factor
        context, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor(time_ids, dtype=torch.float32)}
        noisy = ddpm.add_noise(model_input, noise, t)
        predicted = pipe.unet(noisy, t, context, added_cond_kwargs=added).sample
        return float(torch.nn.functional.mse_loss(predicted, noise))
