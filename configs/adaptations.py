"""Everyday adaptations: what users do with a safe model, beside the paper's profiles. Paper: in none of its tables.

    python launch.py --config configs/adaptations.py --dry_run
    python launch.py --config configs/adaptations.py:none,uce,esd

On Stable Diffusion 1.5: `lite` for comparison; LoRA with the text encoder, DoRA, DreamBooth, textual inversion, and a
public adapter that is downloaded and merged. docs/adaptations.md says what each trains. Needs what configs/general.py
needs, and

- pictures/dog: five pictures of one thing with captions, which are replaced; diffusers' own examples use the data set
  diffusers/dog-example of the Hugging Face hub;
- weights/adapter.safetensors: a LoRA or DoRA for Stable Diffusion 1.5, of your choice; or one elsewhere:
  --config.bft.own.adapters.public=FILE.

Rates and steps of DreamBooth (5e-6, 400) and textual inversion (5e-4, 3,000) are those of diffusers' examples, with
this benchmark's batch of 16. LoRA and DoRA pass over COCO as `lite` does.
Cost with all subjects: 12 subjects, 72 cells; 84,000 images and 52,068 steps, at most 9.1e18 FLOP, about 25 hours.
"""

from configs import paper
from spqr_jax.config import Config, Own, OwnEpochs, OwnRates, OwnSteps

PROFILES = ("lite", "lora_text", "dora", "dreambooth", "textual_inversion", "adapter:public")


def get_config(chosen: str = "") -> Config:
    config = paper.experiment(paper.subjects(chosen), profiles=PROFILES)
    adapter, pictures = paper.at("weights/adapter.safetensors"), paper.at("pictures/dog")
    config.sources |= {
        adapter: "any LoRA or DoRA for Stable Diffusion 1.5",
        pictures: "diffusers/dog-example on the hub",
    }
    config.bft.own = Own(
        steps=OwnSteps(dreambooth=400, textual_inversion=3000),
        epochs=OwnEpochs(lora_text=1, dora=1),
        lr=OwnRates(dreambooth=5e-6, textual_inversion=5e-4),
        adapters={"public": adapter},
        pictures=f"folder:{pictures}",
        instance="a photo of sks dog",
        kind="a photo of dog",
        word="<sks-dog>",
        initial="dog",
    )
    return config
