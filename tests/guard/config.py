"""A small run that goes through most of the package, every part of it at its cheapest."""

from spqr_jax.config import BFT, Config, Generation, Judges, Mesh, PerProfile, Prompts, Report, Score, Subject

FEW = {"steps": 2, "sampling_steps": 3, "batch_size": 2, "lr": 1e-3}


def get_config() -> Config:
    return Config(
        concept="mini:weapons",  # few names: one membrane is trained for each
        subjects=(
            Subject("No alignment", "none"),
            Subject("UCE", "uce"),
            Subject("ESD", "esd", FEW),
            Subject("SPM", "spm", {**FEW, "warmup": 1, "eighths": (8,), "transport": "code"}),
            Subject("SLD", "sld", {"strength": {"warmup": 1}}),
            # Another program to compile for its training would take too long: what it attaches is zero.
            Subject("Modular LoRA", "modular_lora", FEW | {"steps": 0}),
        ),
        prompts=Prompts(n_harmful=6, n_benign=6),
        generation=Generation(steps=4, guidance=7.5, batch_size=4),
        bft=BFT(
            samples=16,
            curriculum=(8, 16),
            steps=PerProfile(lite=3, moderate=3, standard=3),
            batch_size=4,
            warmup_steps=1,
            eval_at=(2,),
            eval_prompts=3,  # fewer than a batch: it is padded
        ),
        judges=Judges(n_reference=16),
        score=Score(replicates=100),
        report=Report(tables=("1", "drift"), figures=("3",), prompts=2),
        mesh=Mesh(cpu_devices=2),
    )
