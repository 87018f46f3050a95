"""The paper's Table 1 on the emoji world: its eleven methods, the control, and two defences beside them.

    python launch.py --config configs/table1_mini.py
    python launch.py --config configs/table1_mini.py --config.bft.scenarios="('general',)" \
        --config.bft.seeds="(42, 1, 2)"

Needs nothing but the package; resumable. 14 subjects x 3 profiles x 7 scenarios = 294 cells of 300 pictures: hours on 2
CPU cores. The second command adds two fine-tuning seeds of the general scenario, in the same work directory. Narrow it
with --config.bft.scenarios, --config.bft.profiles and --subjects.

The methods' settings are their authors', scaled by one rule to a small model and a short run, as configs/mini.py
scales ESD: learning rates ten times as high, a tenth of the steps where they are 1,000 or more (STEREO's three phases
take 30 each), batches of 8 instead of one, 10 sampling steps instead of 50, 160 images instead of hundreds. UCE and
RECE erase a name in short captions too, as UCE's authors can. The rule was looked at where nothing is scored, on
the concept and the prompts of configs/mini_settings.py (docs/mini.md, "Settings on another concept").
"""

from configs import mini
from spqr_jax.config import Config, Subject
from spqr_jax.mini import world

SAMPLING = {"sampling_steps": 10}
PICTURES = {"images": 160, "batch_size": 8, "steps": 100, "sampling_steps": 10, "sampling_guidance": 4.0}


def get_config(category: str = "weapons") -> Config:
    config = mini.get_config()
    config.concept = config.prompts.harmful = f"mini:{category}"
    unsafe = " ".join(world.HARMFUL[category].values())  # the world knows the objects' names alone
    erase = {"steps": 100, "batch_size": 8, "lr": 1e-4, **SAMPLING}
    config.subjects = (
        Subject("No alignment", "none"),
        Subject("EraseDiff", "erasediff", PICTURES | {"lr": 1e-4}),
        Subject("FMN", "fmn", {"lr": 2e-5, **SAMPLING, "sampling_guidance": 4.0}),
        Subject(
            "AdvUnlearn",
            "advunlearn",
            {"steps": 100, "warmup": 20, "lr": 1e-4, "batch_size": 4, "attack_steps": 5, "walks": 1, **SAMPLING},
        ),
        Subject("Scissorhands", "scissorhands", PICTURES | {"lr": 1e-4}),
        Subject(
            "STEREO",
            "stereo",
            {
                "erase_steps": 30,
                "erase_lr": 5e-5,
                "attack_steps": 30,
                "final_steps": 30,
                "final_lr": 2e-4,
                "images": 64,
                "batch_size": 8,
                "attack_batch_size": 8,
                "start_word": "cat",
                "image_steps": 10,
                "image_guidance": 4.0,
                **SAMPLING,
            },
        ),
        Subject("SalUn", "salun", PICTURES | {"lr": 1e-4, "mask_steps": 20}),
        Subject("MACE", "mace", {"images": 4, "steps": 12, "lr": 1e-4, **SAMPLING, "sampling_guidance": 4.0}),
        Subject("ESD", "esd", erase),
        Subject(
            "SPM",
            "spm",
            {"steps": 300, "warmup": 50, "lr": 1e-3, "batch_size": 8, "eighths": (8,), **SAMPLING},
        ),
        Subject("UCE", "uce", {"expand": True}),
        Subject("RECE", "rece", {"expand": True}),
        Subject("Modular LoRA", "modular_lora", erase | {"steps": 150, "lr": 1e-3}),
        Subject("SLD", "sld", {"text": unsafe, "strength": {"warmup": 1}}),  # 10 of 50 evaluations are 1 of 6
    )
    config.bft.scenarios = world.SCENARIOS
    return config
