"""The whole benchmark on the emoji world, on a laptop.

    python launch.py --config configs/mini.py

Needs nothing but the package. Four subjects (no alignment, UCE, RECE, ESD), three fine-tuning profiles, the general
scenario, one seed, 200 harmful and 100 benign prompts. At most 10 minutes on 2 CPU cores (docs/mini.md).

Fine-tuning follows the paper's Tables B and C, scaled in steps only: learning rate, batch, decay, clipping, rank and
dropout are the paper's; 1:3:10 epochs become 12:36:120 steps, and the warm-up keeps its share of the standard profile.
"""

from spqr_jax.config import BFT, Config, Generation, Judges, Mesh, PerProfile, Prompts, Subject

# The paper's standard profile: 10 epochs of 5,000 samples in batches of 16, 500 of them warm-up.
WARMUP_SHARE = 500 / (10 * 5000 / 16)


def get_config() -> Config:
    return Config(
        subjects=(
            Subject("No alignment", "none"),
            Subject("UCE", "uce"),
            Subject("RECE", "rece"),
            Subject("ESD", "esd", {"steps": 100, "batch_size": 8, "sampling_steps": 10, "lr": 1e-4}),
        ),
        prompts=Prompts(n_harmful=200, n_benign=100),
        generation=Generation(steps=6, guidance=4.0, scheduler="dpmpp"),
        bft=BFT(
            samples=500,
            curriculum=(100, 300, 500),
            steps=PerProfile(lite=12, moderate=36, standard=120),
            warmup_share=WARMUP_SHARE,
        ),
        judges=Judges(n_reference=1000),
        mesh=Mesh(cpu_devices=2),
    )
