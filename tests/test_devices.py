"""Which device is picked, and that everything happens there: on a card made of nothing."""

import pytest
import torch

from mdmrl.config import InputError
from mdmrl.provenance import environment, machine, pick_device


@pytest.fixture
def cards(monkeypatch):
    """Sets how many cards this torch sees."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"Card {device}")

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    see(0)
    return see


def test_the_card_is_picked_where_there_is_one(cards, monkeypatch):
    assert pick_device() == pick_device("cpu") == pick_device(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == pick_device("mps") == "mps"
    cards(2)
    assert pick_device() == pick_device("cuda") == "cuda"
    assert pick_device("cuda:1") == "cuda:1" and pick_device("cpu") == "cpu"


def test_each_process_has_a_card_of_its_own(cards, monkeypatch):
    cards(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device() == pick_device("cuda") == pick_device("cuda:1") == "cuda:1"
    with pytest.raises(InputError, match="cuda:0 asked by process 1 of 2: ask for cuda"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes on this machine, but each sees 2 cards"):
        pick_device()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="3 processes"):
        pick_device()
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("cuda", "cuda asked, but this torch .* sees no card: ask for cpu"),
        ("cuda:0", "cuda:0 asked, but this torch .* sees no card"),
        ("mps", "mps asked, but this torch sees no Apple GPU"),
        ("gpu", "unknown device 'gpu': .*known: auto, cpu, cuda, mps"),
        ("cuda:one", "unknown device 'cuda:one'"),
        ("cuda:", "unknown device 'cuda:'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(cards, asked, says):
    with pytest.raises(InputError, match=says):
        pick_device(asked)


def test_a_card_beyond_the_last_is_refused(cards):
    cards(2)
    with pytest.raises(InputError, match="cuda:2 asked, but the last of the 2 cards is cuda:1"):
        pick_device("cuda:2")


def test_provenance_names_the_device_of_the_policy(cards):
    cards(2)
    assert machine("cuda:1") == "Card cuda:1" == environment("cuda:1")["machine"]
    assert "cores" in machine("cpu") and environment(torch.device("cpu"))["machine"] == machine(
        "cpu"
    )
