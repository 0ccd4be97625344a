"""Training in a thread: stop and resume, sampling meanwhile, and the view of a run's folder."""

import copy
import signal
import time

import pytest
import torch
from conftest import Cut, parity
from test_grpo import ROWS, settings, timeless
from test_sampling import PROMPTS

from mdmrl.policies import add_lora
from mdmrl.rl.grpo import train_grpo
from mdmrl.runs import Run, Stopped, being_written, request_stop
from mdmrl.sampling import SamplerConfig, generate
from mdmrl.study import live
from mdmrl.study.live import Live, in_background, watched


@pytest.fixture
def looked_at(monkeypatch):
    """As in a kernel of JupyterLab."""
    monkeypatch.setenv("JPY_SESSION_NAME", "mine.ipynb")


class Stopping(Cut):
    """`parity` that asks for a stop at its n-th call."""

    def __init__(self, folder, call):
        super().__init__()
        self.folder, self.stops_at = folder, call

    def __call__(self, *given, **columns):
        if self.calls + 1 == self.stops_at:
            request_stop(self.folder)
        return super().__call__(*given, **columns)


def weights(policy):
    return {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}


@pytest.mark.parametrize("lora", [False, True])
def test_stopped_and_resumed_is_as_never_stopped(mdm, tmp_path, looked_at, lora):
    """Between two checkpoints; LoRA's second reference is an adapter."""
    if lora:
        add_lora(mdm, r=4, seed=3)
    twin = type(mdm)(copy.deepcopy(mdm.model), mdm.tokenizer)
    shape = {"max_steps": 5, "save_steps": 3, "eval_steps": 2, "ref_model_sync_steps": 2}
    shape |= {"learning_rate": 3e-3}
    given = (ROWS, settings(tmp_path / "whole", mdm, **shape), ROWS[:1])
    train_grpo(twin, [Cut()], *given)

    folder = tmp_path / "run"
    reward = Stopping(folder, 6)  # within the fourth update: two looks came before
    run = in_background(train_grpo, mdm, [reward], ROWS, settings(folder, mdm, **shape), ROWS[:1])
    with pytest.raises(Stopped, match=r"stopped as asked after \d of 5 updates; the same call"):
        run.wait()
    assert not run.running and not run.complete and "stopped, " in run.shown()
    kept, _ = Run.latest_checkpoint(run)  # whose folder is all that it reads
    assert kept == len(timeless(folder)) == 4
    run.start()
    assert run.wait() == folder and run.complete
    assert timeless(folder) == timeless(tmp_path / "whole")
    found, expected = weights(mdm), weights(twin)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_sampling_while_the_policy_is_trained_gives_the_texts_it_gives_alone(mdm, tmp_path):
    """The weights stay, at that learning rate; the reference is another model."""
    sync = mdm.sync_reference

    def another():
        sync()
        with torch.no_grad():
            for weight in mdm._reference.parameters():
                weight.neg_()

    mdm.sync_reference = another
    draw = SamplerConfig(max_new_tokens=12, steps=12)
    alone, drawn = generate(mdm, PROMPTS[:2], draw).completions, []
    config = settings(tmp_path, mdm, max_steps=4, learning_rate=1e-30)
    run = Live(tmp_path, lambda: train_grpo(mdm, [parity], ROWS, config))
    run.start()
    while run.running:
        drawn.append(generate(mdm, PROMPTS[:2], draw).completions)
    run.wait()
    assert len(drawn) > 1 and all(texts == alone for texts in drawn)


def test_a_stop_is_asked_of_whoever_writes(tmp_path):
    """And of nobody else: the next run of that folder would hear it."""
    request_stop(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with Run(tmp_path, {"max_steps": 1}) as run:
        assert being_written(tmp_path) and not run.stop_requested()
        request_stop(tmp_path)
        assert run.stop_requested()
    assert not being_written(tmp_path)
    with Run(tmp_path, {"max_steps": 1}) as run:
        assert not run.stop_requested()
    request_stop(tmp_path)
    assert not run.stop_requested()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_view_is_there_before_the_run_and_follows_it(tmp_path, looked_at, monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.01)
    folder = tmp_path / "run"
    box = Live(folder).widget()
    (stop, resume), view = box.children[0].children, box.children[1]
    until(lambda: stop.disabled and resume.disabled)
    assert "nothing has been logged yet" in view.value
    with Run(folder, {"max_steps": 3}) as run:
        until(lambda: not stop.disabled)
        run.log({"step": 0, "reward": None, "step_time": 30.0})
        run.log({"step": 1, "reward": 0.25, "loss/kl": 1e-3, "step_time": 30.0})
        texts = {"prompt": "why?", "completions": ["<b>so", "no"], "rewards": [1.5, None]}
        run.log({"step": 1, **texts}, "samples")
        until(lambda: "running, 2 of 3 updates, about 30 s left" in view.value)
        assert "<b>0.25</b>" in view.value and "loss/kl" in view.value
        until(lambda: "&lt;b&gt;so" in view.value and "1.50" in view.value)
        stop.click()
        assert run.stop_requested()
    until(lambda: "stopped, 2 of 3 updates" in view.value and stop.disabled)
    with Run(folder, {"max_steps": 3}) as run:
        run.log({"step": 3})
    until(lambda: "complete, 3 updates" in view.value)


def test_the_button_resumes_and_a_failure_is_shown_and_raised(tmp_path, looked_at, monkeypatch):
    monkeypatch.setattr(live, "EVERY", 0.01)
    tries = iter([ZeroDivisionError("by <0>"), None])

    def make():
        if error := next(tries):
            raise error
        with Run(tmp_path, {"max_steps": 1}) as run:
            run.log({"step": 1})

    run = Live(tmp_path, make)
    run.start()
    with pytest.raises(ZeroDivisionError):
        run.wait()
    box = run.widget()
    (_, resume), view = box.children[0].children, box.children[1]
    assert "ZeroDivisionError: by &lt;0&gt;" in view.value
    until(lambda: not resume.disabled)
    resume.click()
    until(lambda: "complete" in view.value and resume.disabled)


def test_where_nobody_looks_the_run_is_made_at_once_with_lines(mdm, tmp_path, capsys):
    config = settings(tmp_path / "run", mdm, max_steps=2)
    run = in_background(train_grpo, mdm, [parity], ROWS, config)
    assert "run: update 2 of 2" in capsys.readouterr().err
    assert run.wait() == tmp_path / "run" and not run.running
    shown = run._repr_mimebundle_()
    assert shown.keys() == {"text/html"} and "complete, 2 updates" in shown["text/html"]
    with watched(tmp_path / "run"):
        pass
    assert not capsys.readouterr().out


def test_a_cell_that_trains_is_watched_and_an_interrupt_stops_it_softly(
    tmp_path, looked_at, monkeypatch
):
    shown, handler = [], signal.getsignal(signal.SIGINT)

    class Display:
        def update(self, what):
            shown.append(what.data)

    monkeypatch.setattr("IPython.display.display", lambda what, display_id: Display())
    with watched(tmp_path), Run(tmp_path, {"max_steps": 3}) as run:
        run.log({"step": 0})
        signal.raise_signal(signal.SIGINT)
        assert run.stop_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert shown == [f"<b>{tmp_path.name}</b>: stopped, 1 of 3 updates"]
    assert signal.getsignal(signal.SIGINT) is handler
