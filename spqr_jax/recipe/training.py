"""One training loop for all models of the emoji world: batches by step, checkpoints, resume, moving average, losses."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from spqr_jax.files import checkpoint
from spqr_jax.params import Params

CHECKPOINT_EVERY = 500
LOG_EVERY = 50
LOG = "loss.csv"  # step and loss, in the folder of a model


class Recipe(NamedTuple):
    """How long and how fast one model is trained.

    The learning rate warms up linearly and decays to zero along a cosine, `cycles` times over. A cycle more trains on
    from a model that is finished (warm restarts, arXiv 1608.03983), and `steps` of all cycles are equal.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 1e-3
    ema: float = 0.0
    cycles: int = 1


def train(
    name: str,
    params: Params,
    loss: Callable[[Params, Any, jax.Array], jax.Array],
    batch: Callable[[np.random.Generator], Any],
    recipe: Recipe,
    workdir: Path,
    *,
    seed: int = 0,
) -> Params:
    """Minimise `loss(params, batch, key)`; returns the weights (their moving average if recipe.ema).

    Step i draws its batch from `default_rng((seed, i))`, so a run that was stopped continues from its last checkpoint
    in `workdir` with the same batches. Every LOG_EVERY steps the loss is written to `workdir`/name/LOG. A non-finite
    loss raises FloatingPointError naming the step.
    """
    final = workdir / name / "final"
    if final.is_dir():
        return checkpoint.load(final)
    cycle = {"init_value": 0.0, "peak_value": recipe.lr, "warmup_steps": recipe.warmup, "decay_steps": recipe.steps}
    schedule = optax.sgdr_schedule([cycle] * recipe.cycles)
    steps = recipe.steps * recipe.cycles
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=recipe.weight_decay)
    )

    @jax.jit
    def step(state, batch, key):
        value, grads = jax.value_and_grad(loss)(state["params"], batch, key)
        updates, opt = optimiser.update(grads, state["opt"], state["params"])
        new = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(recipe.ema, (1 + state["step"]) / (10 + state["step"]))
        ema = jax.tree.map(lambda a, b: a * decay + b * (1 - decay), state["ema"], new)
        return {"params": new, "opt": opt, "ema": ema, "step": state["step"] + 1}, value

    state = {"params": params, "opt": optimiser.init(params), "ema": params, "step": jnp.int32(0)}
    state = _restore(workdir / name / "last", state)
    start, base = int(state["step"]), jax.random.key(seed)
    log = workdir / name / LOG
    _open_log(log, start)
    with tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=5) as bar:
        for i in range(start, steps):
            state, value = step(state, batch(np.random.default_rng((seed, i))), jax.random.fold_in(base, i))
            bar.update()
            if i % LOG_EVERY == 0 or i + 1 == steps:
                if not np.isfinite(value):
                    raise FloatingPointError(f"{name}: the loss is {value} at step {i}; the last checkpoint is kept.")
                bar.set_postfix(loss=f"{float(value):.4f}")
                with log.open("a", encoding="utf-8") as file:
                    file.write(f"{i},{float(value):.6g}\n")
            if (i + 1) % CHECKPOINT_EVERY == 0:
                checkpoint.save(workdir / name / "last", _as_dict(state))
    result = state["ema"] if recipe.ema else state["params"]
    checkpoint.save(final, result)
    return result


def keep_logs(workdir: Path, names: Iterable[str], out: Path) -> None:
    """Copy the losses of finished trainings beside what they made, as out/<name>.csv."""
    out.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(workdir / name / LOG, out / f"{name}.csv")


def _open_log(path: Path, start: int) -> None:
    """A log whose rows end before step `start`: what follows the checkpoint is computed again."""
    header, *rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else ["step,loss"]
    kept = [row for row in rows if int(row.split(",")[0]) < start]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *kept, ""]), encoding="utf-8")


def _as_dict(state: Any) -> dict[str, Any]:
    """The leaves by number: optimiser states hold tuples, which a checkpoint does not."""
    return {f"leaf{i}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _restore(path: Path, state: Any) -> Any:
    if not path.is_dir():
        return state
    saved = checkpoint.load(path)
    leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(len(saved))]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
