"""Benches: what they compare, not how long it took."""

import json

import pytest
from test_sampling import double

from mdmrl.bench import peers
from mdmrl.bench import samplers as bench
from mdmrl.bench.judging import bench_judge
from mdmrl.bench.tables import bench_tables
from mdmrl.bench.updates import bench_estimators, bench_update
from mdmrl.config import InputError
from mdmrl.policies import load_policy


def rows_of(policy, monkeypatch, **options):
    monkeypatch.setattr(bench, "bench_policy", lambda name, *_: double(policy))
    own = {"steps": [6], "block_length": 4} if policy.denoises else {}
    options = {"lengths": [12], "batches": [3], **own} | options
    numbers = bench.bench_samplers("x", prompt_length=30, repeats=1, **options)
    json.dumps(numbers)
    bench.print_bench(numbers)
    return {row["sampler"]: row for row in numbers["rows"]}


def test_exact_samplers_agree_with_the_plain_loop(mdm, monkeypatch):
    rows = rows_of(mdm, monkeypatch)
    assert list(rows) == [
        "plain loop",
        "exact",
        "plain loop, blocks of 4",
        "exact, blocks of 4",
        "prefix cache",
        "dual cache",
        "threshold 0.9",
        "threshold 0.9, dual cache",
    ]
    for name in ("exact", "exact, blocks of 4"):
        assert rows[name]["agreement"] == 1
        assert rows[name]["nfe"] == 6
        assert rows[name]["token_forwards"] == 6 * 3 * (30 + 12)
    full, behind, block = 3 * 42, 12 + 8 + 4, 4
    assert rows["prefix cache"]["token_forwards"] == 3 * full + 3 * behind
    assert rows["dual cache"]["token_forwards"] == 3 * full + 3 * 3 * block
    assert 0 < rows["dual cache"]["agreement"] < 1


def test_some_samplers_alone_beside_their_plain_loop(mdm, monkeypatch):
    rows = rows_of(mdm, monkeypatch, samplers=["dual cache"])
    assert list(rows) == ["plain loop, blocks of 4", "dual cache"]
    with pytest.raises(ValueError, match="sampler 'dual': did you mean 'dual cache'"):
        rows_of(mdm, monkeypatch, samplers=["dual"])


@pytest.mark.parametrize("family", ["ar", "bd"])
def test_exact_caches_agree_with_the_plain_loop(family, request, monkeypatch):
    rows = rows_of(request.getfixturevalue(family), monkeypatch)
    plain, cached = rows.values()
    assert cached["agreement"] == 1
    assert cached["nfe"] == plain["nfe"]
    assert cached["token_forwards"] < plain["token_forwards"] / 2


def test_what_a_family_would_ignore_is_refused(ar, bd, monkeypatch):
    with pytest.raises(InputError, match=r"steps=\[6\]: x has no denoising steps"):
        rows_of(ar, monkeypatch, steps=[6])
    for policy, size in ((ar, 4), (bd, 6)):
        with pytest.raises(InputError, match=f"block_length={size}: x has no such blocks"):
            rows_of(policy, monkeypatch, block_length=size)


def test_shapes_are_published_ones_with_random_weights(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", (16, 1, 16, 2, 1, 5000))
    policy = bench.bench_policy("random-bd:small", 8)
    assert (policy.kind, policy.block_length) == ("bd", 8)
    assert policy.model.get_output_embeddings().weight.shape == (5000, 16)
    with pytest.raises(ValueError, match="expected random-KIND:SHAPE with KIND of ar, mdm, bd"):
        bench.bench_policy("random-mdm:smol", 8)


def test_the_page_shows_what_was_measured(mdm, monkeypatch, tmp_path):
    numbers = {"policy": "x", "machine": "M", "threads": 2}
    row = rows_of(mdm, monkeypatch)["dual cache"] | {"speedup": 2.345, "agreement": 0.5}
    update = {"seconds": 1.5, "seconds_ratio": 1.25, "memory": 2.5e9, "memory_ratio": 0.5}
    written = {
        "samplers_b": {"rows": [row]},
        "samplers_a": {"rows": [row]},
        "update_x_trl": {"length": 128, "rows": {"trl": update}},
        "judge": {"programs": 200, "rows": [{"way": "monty", "per_second": 106.2}]},
        "update": {},  # without rows to set side by side
    }
    for name, found in written.items():
        (tmp_path / f"bench_{name}.json").write_text(json.dumps(numbers | {"policy": name} | found))
    tables = {section: table.splitlines() for section, table in bench_tables(tmp_path).items()}
    assert {section: len(table) for section, table in tables.items()} == {
        "bench": 4,
        "updates": 3,
        "judge": 3,
    }
    assert tables["bench"][2].startswith("| samplers_a | dual cache | 3 | 12 | 6 | 414 |")
    assert tables["bench"][3].endswith("| 2.35 | 50.0% | M, 2 threads |")
    shown = "| update_x_trl | trl | 128 | 1.5 | 1.25 | 2.5 | 0.50 | M, 2 threads |"
    assert tables["updates"][2] == shown
    assert tables["judge"][2] == "| monty | 106 | 200 | M, 2 threads |"


def test_estimators_are_timed_against_the_twin():
    numbers = bench_estimators(repeats=1, length=4)
    json.dumps(numbers)
    rows = {row["estimator"]: row for row in numbers["rows"]}
    assert list(rows) == ["exact", "one_step", "complementary", "coupled"]
    assert rows["exact"]["ratio_to_ar"] == 1
    one, two = (rows[name]["seconds"] for name in ("one_step", "coupled"))
    assert rows["coupled"]["ratio_to_ar"] / rows["one_step"]["ratio_to_ar"] == pytest.approx(
        two / one
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"peer": "tlr"}, "did you mean 'trl'"),
        ({"policy": "tiny-mdm"}, "no diffusion"),
        ({"lora_r": -1}, "lora_r=-1: expected a rank"),
        ({"batch": 4}, "batch=4: expected 6 or 12 of the 12 completions"),
    ],
)
def test_what_an_update_is_set_beside_is_refused_by_name(asked, said, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    with pytest.raises(InputError, match=said):
        peers.bench_against(**{"peer": "trl"} | asked)


@pytest.mark.parametrize(("lora_r", "batch"), [(0, 12), (4, 6)])
def test_ours_and_the_textbook_make_updates(lora_r, batch, tmp_path):
    policy = load_policy("tiny-ar")
    peers._without_an_end(policy)
    policy.save_pretrained(tmp_path)
    for run in (peers.of_ours, peers.of_textbook):
        assert len([*run(str(tmp_path), 4, 2, "cpu", lora_r, batch)]) == 2


@pytest.mark.parametrize("counts", [{"repeats": 0}, {"lengths": [0]}, {"batches": [2, 0]}])
def test_counts_below_one_are_refused(counts):
    with pytest.raises(InputError, match="=0: expected at least 1"):
        bench.bench_samplers("tiny-mdm", **counts)
    with pytest.raises(InputError, match="block_length=0"):
        bench.bench_samplers("tiny-mdm", block_length=0)
    for timed in (bench_estimators, bench_judge, bench_update):
        with pytest.raises(InputError, match="repeats=0: expected at least 1"):
            timed(repeats=0)
    with pytest.raises(InputError, match="unknown dtype 'float16'"):
        bench.bench_policy("random-ar:smollm2", 32, dtype="float16")
