"""Tasks with answers that can be checked: generators, splits, loaders."""

import itertools

import pytest

from mdmrl.tasks import load_task

GENERATED = ("countdown", "gsm", "math", "choice")


def test_an_item_of_a_stream_depends_on_the_seed_and_its_number_alone():
    for name in (*GENERATED, "reasoning"):
        stream = load_task(name).stream
        rows = list(itertools.islice(stream(3), 30))
        assert list(itertools.islice(stream(3, 20), 10)) == rows[20:]
        assert list(itertools.islice(stream(4, 20), 10)) != rows[20:]


@pytest.mark.parametrize("name", GENERATED)
def test_completions_fit_the_length_that_the_task_sets(name, tokenizer):
    task = load_task(name)
    lengths = [len(tokenizer(row["completion"]).input_ids) + 1 for row in task.rows("test")]
    assert max(lengths) <= task.sampler["max_new_tokens"]
    assert task.sampler["max_new_tokens"] % 4 == 0
