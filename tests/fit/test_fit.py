"""The whole answer for a tiny config on this machine's CPU, and what a target says that is not there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import convert
from configs import mini as mini_config
from spqr_jax import finetune, mini
from spqr_jax.fit import fitting, memory, programs, table, targets, work
from spqr_jax.fit.fitting import Asked, Question
from spqr_jax.fit.memory import Measured
from spqr_jax.run import protocol

ROOT = Path(__file__).parents[2]
GIB = 2**30


def config(**bft):
    found = protocol.resolve(mini_config.get_config())
    return dataclasses.replace(found, bft=dataclasses.replace(found.bft, **bft))


@pytest.fixture
def compiled(monkeypatch):
    """(remat, accumulate, batch) -> bytes that a compilation gives; 0: it is refused. Others give 1 byte."""
    table = {}

    def measure(question, make, *arguments):
        program = make(question.plan, *arguments)
        key = program.about.get("remat"), program.about.get("accumulate"), program.about["batch"]
        total = table.get(key, 1)
        reason = "" if total else "NotImplementedError: no kernel"
        return program, Measured(bool(total), total or None, {}, 1e9, None, 0.0, reason)

    monkeypatch.setattr(Question, "measure", measure)
    return table


def rows(answer):
    return {row["program"]: row for row in answer["programs"]}


def test_all_programs_of_mini_fit_and_the_form_of_the_answer(compiled):
    answer = fitting.answer(mini_config.get_config(), targets.find("cpu"), Asked())
    names = ["text encoding", "image encoding", *(f"training step, {p}" for p in ("lite", "moderate", "standard"))]
    names += ["aligning step, ESD esd-u emoji weapons", "sampler"]
    assert list(rows(answer)) == names and answer["target"] == "cpu" and answer["fits"]
    needed = {"program", "fits", "bytes", "limit_bytes", "flops", "compile_s", "reason", "batch", "dtype"}
    assert all(needed <= set(row) for row in answer["programs"])
    assert json.loads(json.dumps(answer)) == answer


def test_a_step_is_computed_as_a_run_would_choose(compiled):
    """A run leaves a tenth of an accelerator's memory free, and all of a CPU's limit is there."""
    too_much = targets.find("cpu").limit + 1
    compiled |= {(False, 1, 16): too_much, (True, 1, 16): too_much, (True, 2, 16): too_much}
    answer = fitting.answer(config(profiles=("standard",)), targets.find("cpu"), Asked())
    row = rows(answer)["training step, standard"]
    assert answer["fits"] and row["fits"] and not row["remedy"]
    assert (row["accumulate"], row["remat"], row["fsdp"]) == (4, True, False)
    assert [(t["accumulate"], t["remat"], t["fits"]) for t in row["tried"]] == [
        (1, False, False),
        (1, True, False),
        (2, True, False),
    ]
    text = table.text(answer)
    assert "training step, standard: a run computes it with accumulate 4, remat True, fsdp False." in text


def test_a_step_that_fits_in_no_way_is_answered_with_bytes_and_remedies(compiled):
    too_much = targets.find("cpu").limit + 10**9
    compiled |= {(remat, k, 16): too_much - k for remat in (False, True) for k in (1, 2, 4, 8, 16)}
    answer = fitting.answer(config(profiles=("standard",)), targets.find("cpu"), Asked())
    row = rows(answer)["training step, standard"]
    assert not answer["fits"] and not row["fits"] and row["remedy"].startswith("standard: the smallest program takes")
    assert "mesh.fsdp" in row["remedy"] and (row["accumulate"], row["remat"]) == (16, True)
    assert [t["accumulate"] for t in row["tried"]] == [1, 1, 2, 4, 8]


def test_what_the_config_gives_is_all_that_is_tried(compiled):
    compiled[True, 4, 16] = targets.find("cpu").limit + 1
    found = config(profiles=("standard",), remat=True, accumulate=4)
    row = rows(fitting.answer(found, targets.find("cpu"), Asked()))["training step, standard"]
    assert not row["fits"] and (row["accumulate"], row["remat"]) == (4, True) and "tried" not in row


SPLIT = """
import json
from configs import mini
from spqr_jax.fit import fitting, targets
from spqr_jax.fit.memory import Measured

def measure(question, make, *arguments):
    return make(question.plan, *arguments), Measured(True, question.target.limit - 1, {}, 1e9, None, 0.0, "")

fitting.Question.measure = measure
config = mini.get_config()
config.bft.profiles = ("lite", "standard")
rows = []
for megabytes in (60, 1):
    target = targets.find("cpu")._replace(memory=megabytes * 10**6)
    answer = fitting.answer(config, target, fitting.Asked())
    rows.append([(row["fits"], row["fsdp"], len(row.get("tried", ()))) for row in answer["programs"][2:4]])
print(json.dumps(rows))
"""


def test_a_step_whose_state_does_not_fit_on_one_device_is_split_at_once():
    """The emoji world's UNet: 4.3 M parameters, their moments and gradients are 69 MB, a quarter of it on each of 4."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run([sys.executable, "-c", SPLIT], cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    split, nothing = json.loads(run.stdout.splitlines()[-1])
    assert split == [[True, False, 0], [True, True, 0]]
    assert nothing == [[False, False, 0], [False, False, 0]]


def test_a_step_that_cannot_be_compiled_says_why_and_is_not_tried_again(compiled):
    compiled[False, 1, 16] = 0
    row = rows(fitting.answer(config(profiles=("lite",)), targets.find("cpu"), Asked()))["training step, lite"]
    assert not row["fits"] and row["reason"] == "NotImplementedError: no kernel" and "tried" not in row


def test_the_step_is_the_one_that_a_run_compiles():
    """Shapes and program of the real step, made with weights, are those traced without."""
    found = config(profiles=("lite",))
    question = Question.of(found, targets.find("cpu"), Asked())
    traced = programs.training_step(question.plan, "lite").trace()
    pipeline = convert.load(mini.model_path())
    options = {"rank": found.bft.rank, "alpha": found.bft.alpha, "dropout": found.bft.dropout}
    _, trainable, frozen, keys = finetune.prepare(pipeline, "lite", seed=0, **options, lora_init=found.bft.lora_init)
    state, given_frozen, given_keys, *_ = traced.in_avals[0]
    for real, shape in ((trainable, state["params"]), (frozen, given_frozen), (keys, given_keys)):
        assert jax.tree.map(lambda x: x.shape, real) == jax.tree.map(lambda x: x.shape, shape)


@pytest.mark.parametrize(
    ("message", "total"),
    [
        ("the total memory required for HLO temporaries (25.80G) exceeds available HBM (15.75G).", 25.8 * GIB),
        ("Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.", 17.5 * GIB),
        ("Unsupported sequence length Q 4096, KV 77.", None),
    ],
)
def test_what_a_refusal_says_of_memory(message, total):
    refused = memory._refused(RuntimeError(f"RESOURCE_EXHAUSTED: {message}"), 1.0, 2.0)
    assert refused.bytes == (None if total is None else int(total)) and not refused.compiles


def test_work_of_the_emoji_world():
    """docs/mini.md: four subjects, three profiles, 300 prompts; 13, 39 and 130 steps."""
    found = work.of(config())
    assert found.pictures == 300 * (4 + 12)
    assert found.steps == {"lite": 4 * 13, "moderate": 4 * 39, "standard": 4 * 130}


def test_hours_are_number_times_flop_over_rate():
    items = [work.Item("a", 3600, 1e12), work.Item("b", 10, 7.2e14)]
    hours = work.hours(items, targets.find("a100-80"), "bfloat16", 0.5)
    assert hours["device_hours"] == pytest.approx((3600e12 + 7.2e15) / (312e12 * 0.5) / 3600)
    assert work.hours(items, targets.find("a100-80"), "float32", 0.5)["peak_flops"] == 156e12
    assert work.hours(items, targets.find("cpu"), "float32", 0.5)["device_hours"] is None


def test_targets():
    with pytest.raises(ValueError, match=r"--target tpu-v9 is unknown; expected one of cpu, tpu-v5e-4, .*h100"):
        targets.find("tpu-v9")
    assert "device_memory_size: 84942979072" in targets.DESCRIPTION.format(**targets.CARDS["h100"]._asdict())
    for name in targets.CARDS:
        assert targets.find(name).memory == targets.CARDS[name].memory


def test_a_missing_compiler_is_answered_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, command in (("tpu-v5e-4", r"pip install 'jax\[tpu\]'"), ("h100", r"pip install 'jax\[cuda12\]'")):
        with pytest.raises(ModuleNotFoundError, match=command):
            targets.mesh(targets.find(name))


def command(*arguments, **environment):
    line = [sys.executable, "-m", "spqr_jax.fit", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_command_names_what_is_wrong():
    run = command("--config", "configs/mini.py", "--target", "tpu-v9")
    assert run.returncode == 2 and "spqr_jax.fit: --target tpu-v9 is unknown" in run.stderr


TINY = """
import os
from spqr_jax.fit.environment import ENVIRONMENT
os.environ.update(ENVIRONMENT)
from configs import mini
from spqr_jax.fit import fitting, programs, targets
question = fitting.Question.of(mini.get_config(), targets.find("tpu-v5e-4"), fitting.Asked())
program, measured = question.measure(programs.decoder, 1)
print(question.plan.mesh.devices.flat[0].device_kind, measured.compiles, measured.bytes, measured.reason)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)
def test_the_decoder_of_mini_compiles_for_a_tpu():
    run = subprocess.run([sys.executable, "-c", TINY], cwd=ROOT, capture_output=True, text=True)
    if "lock" in run.stderr:
        pytest.skip("another process uses libtpu")
    assert run.stdout.startswith("TPU v5 lite True "), run.stdout + run.stderr[-2000:]


EVERY = """
import os, tempfile
from pathlib import Path
from spqr_jax.fit.environment import ENVIRONMENT
os.environ.update(ENVIRONMENT | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
from configs import mini
from spqr_jax.fit import fitting, memory, programs, targets
config = fitting.protocol.resolve(mini.get_config())
for target in targets.TARGETS.values():
    if target.platform == PLATFORM:
        question = fitting.Question.of(config, target, fitting.Asked())
        program = programs.evaluation(question.plan, 1)
        with tempfile.TemporaryDirectory() as folder:
            found = memory.measure(program, program, target, Path(folder), lambda begun: None)
        print(target.name, found.compiles, found.reason)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "plugin"), [("tpu", "libtpu"), ("cuda", "jax_cuda12_plugin")])
def test_every_target_compiles_the_emoji_world(platform, plugin):
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: {targets.INSTALL[platform]}")
    script = EVERY.replace("PLATFORM", repr(platform))
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    names = [target.name for target in targets.TARGETS.values() if target.platform == platform]
    assert run.stdout.splitlines() == [f"{name} True " for name in names], run.stderr[-2000:]


TOO_BIG = """
import os
from spqr_jax.fit.environment import ENVIRONMENT
os.environ.update(ENVIRONMENT)
from spqr_jax.fit import programs
from tests.fit.compiled import question
asked = question("h100", "small-48", "bfloat16")
asked.plan.config.bft.batch_size = 4096
compiled = programs.training_step(asked.plan, "standard").trace().lower().compile()
print(compiled.memory_analysis().temp_size_in_bytes // 10**9, compiled.as_text().count(".remat"))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason=f"not installed: {targets.INSTALL['cuda']}"
)
def test_a_step_that_is_too_big_for_a_gpu_is_not_rewritten_until_it_nearly_fits():
    """XLA would compute instructions again until its own limit is met, 64.5 GB here, and take many minutes for it."""
    run = subprocess.run([sys.executable, "-c", TOO_BIG], cwd=ROOT, capture_output=True, text=True)
    temporaries, computed_again = map(int, run.stdout.split())
    assert temporaries > 100 and computed_again == 0, run.stderr[-2000:]


HOLD = """
import os, sys
from spqr_jax.fit.environment import ENVIRONMENT
os.environ.update(ENVIRONMENT)
os.environ.pop("ALLOW_MULTIPLE_LIBTPU_LOAD", None)
from spqr_jax.fit import targets
try:
    targets.mesh(targets.find("tpu-v5e-4"))
except RuntimeError as error:
    print(error, flush=True)
else:
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)
def test_another_process_that_holds_libtpu_is_named_with_what_to_do():
    how = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD], **how) as first:
        assert first.stdout.readline().startswith(("has it", "--target"))  # or a third process has it
        second = subprocess.run([sys.executable, "-c", HOLD], input="", cwd=ROOT, capture_output=True, text=True)
        first.stdin.close()
    assert "another process uses libtpu" in second.stdout and "ALLOW_MULTIPLE_LIBTPU_LOAD=1" in second.stdout


def test_what_libtpu_says_of_its_lock_is_understood():
    """The message of libtpu 0.0.52."""
    said = 'ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".'
    reason = targets._reason(targets.find("tpu-v6e-8"), said)
    assert reason.startswith("--target tpu-v6e-8: another process uses libtpu") and "wait for it" in reason
