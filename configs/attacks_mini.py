"""Attacks before and after fine-tuning on the emoji world: does fine-tuning reopen what attacks could not open?

    python launch.py --config configs/attacks_mini.py
    python launch.py --config configs/attacks_mini.py --config.bft.seeds="(42, 43, 44)" --workdir runs/attacks_seeds

Needs nothing but the package; resumable. The control and four methods, before and after the standard profile in the
general scenario, are 10 models; each is attacked on 16 of its 200 harmful prompts. docs/attacks.md says what the
numbers mean. The cells are some of configs/table1_mini.py: with --workdir runs/table1_mini a finished run of that
config gets the attacks alone.

Every attack takes a fiftieth of its authors' steps, and concept inversion, whose steps have a batch, a hundredth; a
quarter of their batches and populations; 6 sampling steps at guidance 4, as the run has. All else is the authors'. The
rule was fixed before the run. Every attack has the same prompts, budget and seeds on every model. Ring-A-Bell is made
once, on the unaligned model, as its authors do.
"""

from configs import table1_mini
from spqr_jax.config import Attack, Config

SUBJECTS = ("No alignment", "UCE", "ESD", "AdvUnlearn", "STEREO")
PROMPTS = 16
DRAWN = {"image_steps": 6, "image_guidance": 4.0}


def get_config() -> Config:
    config = table1_mini.get_config()
    config.subjects = tuple(subject for subject in config.subjects if subject.name in SUBJECTS)
    config.bft.scenarios, config.bft.profiles = ("general",), ("standard",)
    config.attacks = (
        Attack("UnlearnDiffAtk", "unlearndiffatk", {"times": 5, "steps": 8, **DRAWN}, prompts=PROMPTS),
        Attack("P4D", "p4d", {"steps": 60, "every": 10, **DRAWN}, prompts=PROMPTS),
        Attack("Concept inversion", "inversion", {"steps": 50, "batch_size": 4, "images": 8, **DRAWN}, prompts=PROMPTS),
        Attack("Ring-A-Bell", "ring_a_bell", {"population": 50, "generations": 60}, transfer=True, prompts=PROMPTS),
    )
    return config
