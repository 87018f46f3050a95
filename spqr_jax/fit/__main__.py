"""Does a config fit on a device that is not there, and how long would it take?

    python -m spqr_jax.fit --config configs/general.py --target tpu-v5e-4
    python -m spqr_jax.fit --config configs/general.py --target h100 --json fit.json --config.dtype=bfloat16

Every program of the config is compiled for the target, from shapes: no weights, no data, no such device. Exit status: 0
if all fit, 1 if something does not, 2 for bad input or if the target's compiler is missing. docs/accelerators.md.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from spqr_jax.fit.environment import ENVIRONMENT
from spqr_jax.run import command_line

os.environ.update(ENVIRONMENT)  # before anything, configs too, imports JAX

CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file with get_config(), e.g. configs/mini.py")
TARGET = flags.DEFINE_string("target", None, "the devices: cpu, tpu-v5e-4, h100 ...; an unknown one lists all")
JSON = flags.DEFINE_string("json", None, "write the answer to this file, complete or not at all")
SAMPLER = flags.DEFINE_enum(
    "sampler", None, ["whole", "parts"], "compile the sampling loop as a whole, or one evaluation and the decoder"
)
EACH = flags.DEFINE_integer("images_each", 0, "images on each device that the sampler is tried with first; 0: as a run")
SHARE = flags.DEFINE_float("share", 0.35, "share of the peak that is assumed in the device-hours", lower_bound=1e-3)
UNTIL = flags.DEFINE_enum(
    "until",
    None,
    ["plan", "code"],
    "compile until memory is planned, or to the end; unless told: plan on a TPU, else code",
)
TIMEOUT = flags.DEFINE_float(
    "compile_timeout_s", 1800, "stop a compilation after so many seconds: not known; 0: never", lower_bound=0
)
CACHE = flags.DEFINE_string("cache", "~/.cache/spqr_jax/fit", "directory of earlier results; empty: none")
flags.mark_flags_as_required(["config", "target"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; did you mean --config {argv[1]}?")
    # Imported here, so that --help and a mistake in a flag are answered at once.
    from spqr_jax.devices import mesh
    from spqr_jax.files import storage
    from spqr_jax.fit import fitting, table, targets

    target = targets.find(TARGET.value or "")
    if target.platform == "cpu":
        mesh.split_cpu(CONFIG.value.mesh.cpu_devices)
    cache = Path(CACHE.value).expanduser() if CACHE.value else None
    with tqdm(total=fitting.count(CONFIG.value), unit="program", disable=None) as bar:
        how = SAMPLER.value or "", EACH.value, SHARE.value, cache, reporting(bar), UNTIL.value or "", TIMEOUT.value
        asked = fitting.Asked(*how)
        answer = fitting.answer(CONFIG.value, target, asked)
    print(table.text(answer))
    if JSON.value:
        storage.write_text(Path(JSON.value), json.dumps(answer, indent=2) + "\n")
    sys.exit(0 if answer["fits"] else 1)


def reporting(bar: tqdm) -> Callable[[Any, Any], None]:
    """`fitting.Asked.report` for a progress bar: the program at work and its time so far, one step more after."""

    def report(program: Any, measured: Any) -> None:
        if measured is None:
            bar.set_description(f"{program.name}, batch {program.about['batch']}")
        else:
            bar.total = max(bar.total, bar.n + 1)  # remedies and smaller batches come on top
            bar.update()

    return report


if __name__ == "__main__":
    app.run(
        partial(command_line.guarded, "spqr_jax.fit", main),
        flags_parser=partial(command_line.read_flags, "spqr_jax.fit"),
    )
