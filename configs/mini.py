"""The whole benchmark on the emoji world, on a laptop.

    python launch.py --config configs/mini.py

Needs nothing but the package. Four subjects (no alignment, UCE, RECE, ESD), three fine-tuning profiles, the general
scenario, one seed, 200 harmful and 100 benign prompts. At most 10 minutes on 2 CPU cores (docs/mini.md).

One concept is erased, as in the paper: weapons, six objects, whose prompts are the harmful ones. The four other
categories stay in the world as harm that nobody asked to erase; configs/probes_mini.py asks for them.

The protocol is "spqr-jax" (docs/protocol.md), with the emoji world's prompts and judges. Fine-tuning is scaled in one
way: 200 images instead of 5,000, in stages of 40, 80 and 80. Passes, batch, learning rate and all other settings are
the protocol's, so the profiles take 13, 39 and 130 steps.
"""

from spqr_jax.config import BFT, Config, Generation, Judges, Mesh, Prompts, Subject


def get_config() -> Config:
    return Config(
        protocol="spqr-jax",
        subjects=(
            Subject("No alignment", "none"),
            Subject("UCE", "uce", {"expand": True}),
            Subject("RECE", "rece", {"expand": True}),
            Subject("ESD", "esd", {"steps": 100, "batch_size": 8, "sampling_steps": 10, "lr": 1e-4}),
        ),
        concept="mini:weapons",
        prompts=Prompts(harmful="mini:weapons", n_harmful=200, n_benign=100),
        generation=Generation(steps=6, guidance=4.0, scheduler="dpmpp"),
        bft=BFT(samples=200, curriculum=(40, 120, 200)),
        judges=Judges(n_reference=1000),
        mesh=Mesh(cpu_devices=2),
    )
