"""What the shell shows: a completion in colour, how far work has come, and what a machine has."""

import io
import itertools
import json

import pytest
import torch
from conftest import random_policy
from rich.console import Console

from mdmrl import SamplerConfig, cli, generate
from mdmrl.progress import Progress
from mdmrl.study import doctor, terminal
from mdmrl.study.widgets import MASK_SHOWN


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=200, **options)


@pytest.fixture(scope="module")
def drawn(tokenizer):
    policy = random_policy("mdm", tokenizer)
    config = SamplerConfig(max_new_tokens=12, steps=4, temperature=1.0, revise=1)
    return policy, generate(policy, ["ab"], config, record=True)


def test_each_frame_has_what_was_written_for_good_by_then(drawn):
    """Against the canvas, written step by step."""
    policy, output = drawn
    final, mask = output.completion_ids[0], policy.mask_token_id
    canvas, kept = torch.full_like(final, mask), output.completion_mask[0]
    kept = kept & ~torch.isin(final, torch.tensor(policy.end_token_ids))
    pieces = policy.pieces(final[kept].tolist())
    shown = list(terminal.frames(output, policy))
    assert len(shown) == len(output.trajectory) + 1
    assert shown[0].plain == MASK_SHOWN * int(kept.sum())
    later = [set(step.positions.tolist()) for step in output.trajectory]
    for number, step in enumerate(output.trajectory, start=1):
        canvas[step.positions] = step.tokens
        again = set().union(*later[number:])
        open_ = [p in again or canvas[p] == mask for p in kept.nonzero()[:, 0].tolist()]
        wanted = (MASK_SHOWN if o else piece for o, piece in zip(open_, pieces, strict=True))
        assert shown[number].plain == "".join(wanted)
    assert shown[-1].plain == "".join(pieces)


def test_an_autoregressive_text_grows(tokenizer):
    policy = random_policy("ar", tokenizer)
    output = generate(policy, ["ab"], SamplerConfig(max_new_tokens=5))
    shown = [frame.plain for frame in terminal.frames(output, policy)]
    assert shown[0] == "" and all(b.startswith(a) for a, b in itertools.pairwise(shown))


@pytest.mark.parametrize("watch", [False, True])
def test_a_pipe_gets_the_text_alone_and_a_terminal_colours(drawn, monkeypatch, watch):
    policy, output = drawn
    slept = []
    monkeypatch.setattr(terminal.time, "sleep", slept.append)
    screen = console()
    terminal.show(output, policy, watch, screen)
    assert screen.file.getvalue() == output.completions[0] + "\n"
    assert not slept
    screen = console(force_terminal=True, color_system="truecolor")
    terminal.show(output, policy, watch, screen)
    text = screen.file.getvalue()
    assert "\x1b[38;2;" in text and f"of {output.nfe} forward passes" in text
    assert len(slept) == (len(output.trajectory) + 1 if watch else 1)
    assert sum(slept) <= terminal.PLAYED * 1.01


def test_no_bar_without_a_terminal(capsys):
    with Progress("tiny", 0, 2_000_000, unit="token") as progress:
        progress.update(1_000_000, {"loss": 1.5})
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "tiny: token 1,000,000 of 2,000,000, loss 1.5, 0 s left\n"


# ------------------------------------------------------------------ doctor


@pytest.fixture
def healthy(monkeypatch):
    """Each check answered, so that none takes its seconds; `answers` may be changed."""
    answers = {name: (True, f"[{name}] is well") for name, *_ in doctor.CHECKS}
    checks = [(name, needed, lambda n=name: answers[n]) for name, needed, _ in doctor.CHECKS]
    monkeypatch.setattr(doctor, "CHECKS", checks)
    return answers


def test_a_healthy_machine_runs_every_profile(healthy, capsys):
    assert doctor.doctor() == 0
    text = capsys.readouterr().out
    assert all(f"[{name}] is well" in text for name in healthy)
    committed = json.loads((doctor.project_root() / "notebooks/profiles/seconds.json").read_text())
    for profile, notebooks in committed.items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"│ {profile} "))
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells[1] == str(len(notebooks))
        if cells[3] == "two cores elsewhere":
            ends = [0.0] * (1 + (profile in ("smoke", "cpu")))  # of those that run at a time
            for seconds in notebooks.values():
                ends[ends.index(min(ends))] += sum(seconds)
            minutes = round(max(ends) / 60)
            hours = f"{minutes // 60} h " if minutes >= 60 else ""
            assert cells[2] == f"about {hours}{minutes % 60} min"


@pytest.mark.parametrize(("name", "code"), [("Dafny", 0), ("memory", 1)])
def test_only_what_is_needed_makes_it_fail(healthy, capsys, name, code):
    healthy[name] = False, "gone"
    assert doctor.doctor() == code
    text = capsys.readouterr().out
    assert ("profiles that run here" in text) == (code == 0)
    assert (f"before this is mended: {name}" in text) == (code == 1)


def test_a_check_that_raises_is_a_finding(healthy, monkeypatch, capsys):
    def raises():
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", [("box", False, raises)])
    assert doctor.doctor() == 0
    assert "no such thing" in capsys.readouterr().out


def test_what_is_looked_at(monkeypatch):
    assert doctor._packages()[0] and doctor._python()[0]
    assert doctor._room("tidy up", 1e9, 8e9, 2) == (
        False,
        "1.0 of 8.0 GB free: expected 2 GB; tidy up",
    )
    monkeypatch.setattr(doctor.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    well, said = doctor._hub()
    assert not well and "does not answer" in said and "refused" in said
    assert {name for name, needed, _ in doctor.CHECKS if not needed} == {
        "box bubblewrap",
        "Dafny",
        "model hub",
    }


def test_sample_takes_watch(monkeypatch, capsys):
    sampler = ["--sampler", "max_new_tokens=16", "--sampler", "steps=2"]
    monkeypatch.setattr("sys.argv", ["mdmrl", "sample", "tiny-mdm", "x", "--watch", *sampler])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and capsys.readouterr().out.strip()


def test_an_address_of_the_hub_that_is_none_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    for address in ("localhost", "http://localhost:x", "http://["):
        monkeypatch.setattr(doctor.constants, "ENDPOINT", address)
        well, said = doctor._hub()
        assert not well and said.startswith(f"{address} does not answer (")
