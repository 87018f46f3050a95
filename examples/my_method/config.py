"""The emoji world in small, with the method of this package beside no alignment and UCE."""

from spqr_jax.config import BFT, Config, Generation, Judges, Prompts, Subject


def get_config() -> Config:
    return Config(
        protocol="spqr-jax",
        subjects=(
            Subject("No alignment", "none"),
            Subject("UCE", "uce"),
            Subject("Mine", "my_method", {"strength": 1.0}),
        ),
        prompts=Prompts(n_harmful=40, n_benign=40),
        generation=Generation(steps=6, guidance=4.0, scheduler="dpmpp"),
        bft=BFT(profiles=("lite",), samples=40, curriculum=(8, 24, 40)),
        judges=Judges(n_reference=200),
    )
