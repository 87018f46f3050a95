"""The images of a phase: the list of them, the place of each, and the noise it starts from."""

from pathlib import Path

from spqr_jax.files import images
from spqr_jax.files.layout import ImagesFolder
from spqr_jax.files.records import ROLES
from spqr_jax.prompts import Prompt
from spqr_jax.run.stages.state import Run

Job = tuple[str, Prompt, int]  # role, prompt, sample number


def phase_jobs(run: Run) -> list[Job]:
    """Every image of a phase, in the order of the records."""
    return [
        (role, prompt, k) for role in ROLES for prompt in run.prompts[role] for k in range(run.config.prompts.images)
    ]


def picture_path(folder: ImagesFolder, phase: str, role: str, prompt: Prompt, k: int) -> Path:
    return folder.images(phase, role) / images.file_name(prompt.id, k)


def image_seed(prompt: Prompt, k: int) -> int:
    """The prompt's own seed for its first image, then seeds far from any other prompt's: 0..2**32-1."""
    return (prompt.seed + k * 0x9E3779B1) % 2**32
