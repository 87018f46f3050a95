"""The stages of a run: their order, the ones that need no model, and judging in the background."""

import threading

import pytest

from configs import mini
from spqr_jax.devices import preemption
from spqr_jax.run import stages
from spqr_jax.run.stages import Unopened
from spqr_jax.run.stages.background import Background


def test_names_and_needs():
    assert stages.NAMES == ("align", "generate", "finetune", "attack", "probe", "judge", "score", "report")
    assert stages.chosen(None) == set(stages.NAMES) and stages.chosen(["score"]) == {"score"}
    assert not stages.need_models({"score", "report"})
    assert all(stages.need_models({"report", name}) for name in stages.NAMES[:6])
    with pytest.raises(ValueError, match="--stages: 'cook' is unknown; expected some of align,generate"):
        stages.chosen(["align", "cook"])


def test_a_run_without_a_complete_cell_gets_neither_scores_nor_a_report(tmp_path):
    nothing = Unopened(mini.get_config(), tmp_path)
    assert stages.carry_out(nothing, {"score", "report"}) == []
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"leaderboard\.json"):
        stages.carry_out(nothing, {"report"})


def test_the_background_judges_in_order_and_a_failure_stops_nothing():
    seen = []

    def work(item):
        seen.append((item, threading.current_thread().name))
        if item == 1:
            raise ValueError("left to the judge stage")

    with Background(work) as background:
        for item in range(5):
            background.submit(item)
        background.finish()
        assert seen == [(item, "judges") for item in range(5)]
        background.submit(5)  # left to the judge stage
    assert len(seen) == 5
    with Background(None) as nothing:
        nothing.submit(0)


def test_a_run_that_stops_leaves_what_waits_to_the_next_one(monkeypatch):
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def work(item):
        begun.set()
        go_on.wait()
        seen.append(item)

    with pytest.raises(KeyboardInterrupt), Background(work) as background:
        background.submit(0)
        begun.wait()
        background.submit(1)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt
    assert seen == [0]
    monkeypatch.setattr(preemption, "asked_here", lambda: True)
    with Background(work) as background:
        background.submit(2)
    assert seen == [0]
