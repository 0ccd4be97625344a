"""Descriptions and units against single rows, the counts of a forward hook, and the texts that the
task's own generator makes."""

import random

import pytest
import torch
from test_sampling import PROMPTS, double

from mdmrl.rl.config import GRPOConfig
from mdmrl.rl.grpo import train_grpo
from mdmrl.runs import generator_for, read_rows
from mdmrl.sampling import SamplerConfig
from mdmrl.sampling.hierarchy import Hierarchical, Unit, generate_hierarchy
from mdmrl.tasks import load_task, medcot
from mdmrl.tasks.medcot import PARAGRAPHS, combinations, question_row
from mdmrl.tasks.medcot_sections import SECTIONS

UNITS = tuple(Unit(name, f"{name}:", ";\n") for name in ("one", "two", "three", "four"))
DESCRIPTION = SamplerConfig(max_new_tokens=4, steps=2)
UNIT = SamplerConfig(max_new_tokens=8, steps=8)


def run(policy, prompts=PROMPTS[:2], units=UNITS, **changes):
    phases = {"description": DESCRIPTION, "unit": UNIT}
    if not policy.denoises:
        phases = {name: config.replace(steps=None) for name, config in phases.items()}
    options = phases | {"length": 64, "gap": 3} | changes
    return generate_hierarchy(policy, prompts, units, **options)


@pytest.fixture
def pushed(any_policy):
    """Shapes of what goes through the network of `any_policy`, pass by pass."""
    shapes = []
    any_policy.model.get_input_embeddings().register_forward_hook(
        lambda module, given, _: shapes.append(tuple(given[0].shape))
    )
    return shapes


def test_units_in_one_batch_equal_units_alone(any_policy):
    double(any_policy)
    together, one_by_one = run(any_policy), run(any_policy, parallel=False)
    assert together.completions == one_by_one.completions
    for row, prompt in enumerate(PROMPTS[:2]):
        alone = run(any_policy, [prompt])
        assert alone.units == [together.units[row]]
        assert alone.descriptions == [together.descriptions[row]]
    assert len(set(together.units[0])) > 1  # it matters which unit it is


def test_what_it_costs(any_policy, pushed):
    together = run(any_policy)
    assert together.nfe == len(pushed)
    assert together.token_forwards == sum(rows * width for rows, width in pushed)
    before = len(pushed)
    alone = run(any_policy, parallel=False)
    assert alone.nfe == len(pushed) - before == alone.unit_nfe
    assert together.nfe <= alone.nfe / 2
    if any_policy.kind != "ar":  # which may end early
        assert together.nfe == 4 * 2 + 8
        assert together.unit_nfe == alone.nfe == 4 * 2 + 4 * 8
        assert {rows for rows, _ in pushed[:8]} == {2}
        assert {rows for rows, _ in pushed[8:16]} == {8}


def greedy_continuation(policy, prompt, begun, count, behind=0):
    """The `count` next tokens, one a pass and the surest first, of one row without padding."""
    text = f"<|user|>{prompt}<|assistant|>{begun}"
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids
    mask = getattr(policy, "mask_token_id", None)
    ends = policy.end_token_ids
    if policy.kind == "ar":
        for _ in range(count):
            logits = policy.logits(torch.tensor([[*ids, 0]]))[0, -1]
            ids.append(int(logits.argmax()))
        new = ids[-count:]
    else:
        canvas = torch.tensor([ids + [mask] * (count + behind)])
        open_ = set(range(len(ids), len(ids) + count))
        while open_:
            logits = policy.logits(canvas)[0]
            logits[:, mask] = -torch.inf
            best, token = logits.log_softmax(-1).max(-1)
            fine = {i for i in open_ if token[i].item() not in ends} or open_
            chosen = max(sorted(fine), key=lambda i: best[i].item())
            canvas[0, chosen] = token[chosen]
            open_.remove(chosen)
        new = canvas[0, len(ids) : len(ids) + count].tolist()
    first = next((i for i, token in enumerate(new) if token in ends), count)
    return policy.tokenizer.decode(new[:first], skip_special_tokens=True), len(ids)


@pytest.mark.parametrize("kind", ["ar", "mdm"])
def test_every_unit_goes_on_from_what_is_known(kind, request):
    """All contexts spelled out by hand: the prompt, and beginnings of the units so far."""
    policy = double(request.getfixturevalue(kind))
    prompt, width = PROMPTS[0], len(policy.encode(PROMPTS[:1]).input_ids[0])
    steps = 4 if policy.denoises else None
    found = run(policy, [prompt], description=DESCRIPTION.replace(steps=steps))
    rest = "<|mask|><|mask|><|mask|>;\n" if kind == "mdm" else ";\n"

    def next_text(begun, count):
        ids = policy.tokenizer(begun, add_special_tokens=False).input_ids
        return greedy_continuation(policy, prompt, begun, count, 64 - count - len(ids))[0]

    assert width == greedy_continuation(policy, prompt, "", 0)[1]
    known = ""
    for j, c in enumerate(UNITS):
        known += c.opening
        assert found.descriptions[0][j] == next_text(known, 4)
        known += found.descriptions[0][j]
        assert found.units[0][j] == found.descriptions[0][j] + next_text(known, 8)
        known += rest
    whole = zip(UNITS, found.units[0], strict=True)
    assert found.completions == ["".join(f"{c.name}:{text};\n" for c, text in whole)]


def test_a_unit_ends_before_its_first_stop(mdm):
    """Stops are two texts that the policy is known to write."""
    free = run(mdm)
    text = free.units[0][1]
    stop, later = text[1:3], text[3:5]
    assert Unit("x", "", "", (later, stop)).cut(text) == (text[: text.find(stop)], True)
    assert Unit("x", "", "", ("never",)).cut(text) == (text, False)
    begun = free.descriptions[0][0]
    units = (Unit("one", "one:", ";\n", (begun[-1],)), *UNITS[1:])
    found = run(mdm, units=units)
    assert found.units[0][0] == found.descriptions[0][0] == begun[: begun.find(begun[-1])]


def test_a_unit_that_its_description_ends_is_left_out(any_policy, pushed):
    """Every description holds the empty string, and so its unit's end."""
    units = tuple(Unit(name, name, "", ("",)) for name in "abcd")
    found = run(any_policy, units=units)
    assert found.completions == ["abcd", "abcd"]
    assert found.nfe == len(pushed) == found.unit_nfe
    assert {rows for rows, _ in pushed} == {2}


def test_the_same_seed_gives_the_same_texts(any_policy, rng_untouched):
    own = {} if any_policy.denoises else {"steps": None}
    hot = {
        name: c.replace(temperature=1.0, **own)
        for name, c in {"description": DESCRIPTION, "unit": UNIT}.items()
    }
    texts = [
        run(any_policy, generator=generator_for(seed, "x"), **hot).completions for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_is_refused(mdm, bd, ar):
    with pytest.raises(ValueError, match="no units given"):
        run(mdm, units=())
    with pytest.raises(ValueError, match="gap=-1: expected 0"):
        run(mdm, gap=-1)
    with pytest.raises(ValueError, match="block_length=4: expected None"):
        run(mdm, unit=UNIT.replace(block_length=4))
    with pytest.raises(
        ValueError, match="block_length=2: this policy was trained with blocks of 4"
    ):
        run(bd, unit=UNIT.replace(block_length=2))
    with pytest.raises(ValueError, match="block_length=4: an autoregressive policy"):
        run(ar, unit=UNIT.replace(steps=None, block_length=4))
    with pytest.raises(ValueError, match="steps=8: an autoregressive policy"):
        run(ar, unit=UNIT)


# -- the task --------------------------------------------------------------------------------------


def test_sections_are_the_generators_own_parts():
    """Its texts, taken apart and put together again, have all tags and breaks and the answer."""
    for wordings, c in zip(PARAGRAPHS, SECTIONS[:4], strict=True):
        assert wordings[0].startswith(c.opening.removeprefix("<reasoning>"))
    task = load_task("medcot-sections", answer_only=False)
    assert task.units == SECTIONS
    assert task.rows("test") == load_task("medcot").rows("test")
    rng = random.Random(0)
    for combination in combinations("test")[:40]:
        row = question_row(combination, rng.choice(list(medcot.QUESTIONS)), rng)
        fact = combination.condition
        slots = {f"f{i}": x for i, x in enumerate(combination.findings)} | vars(fact)
        slots |= dict.fromkeys(("also", "more", "most"), "a cough")
        parts = [wordings[0].format(**slots) for wordings in PARAGRAPHS]
        texts = [
            part.removeprefix(c.opening.removeprefix("<reasoning>"))
            for part, c in zip(parts, SECTIONS, strict=False)
        ] + [row["Answer"] + "</answer>"]
        cut = [c.cut(text) for c, text in zip(SECTIONS, texts, strict=True)]
        assert all(ended for _, ended in cut)
        whole = "".join(
            c.opening + text + c.closing for c, (text, _) in zip(SECTIONS, cut, strict=True)
        )
        reasoning = "\n\n".join(parts)
        assert whole == f"<reasoning>{reasoning}</reasoning>\n\n<answer>{row['Answer']}</answer>"
        assert task.metric(whole, row)


# -- as a sampler for RL ---------------------------------------------------------------------------


def drawn(policy, max_new_tokens=128, **changes):
    draw = Hierarchical(UNITS, description_tokens=4, unit_tokens=8, length=64, gap=3)
    steps = None if policy.kind == "ar" else max_new_tokens // 2
    config = SamplerConfig(max_new_tokens=max_new_tokens, steps=steps, temperature=1.0)
    return draw(policy, PROMPTS[:2], config, generator_for(0, "x"), **changes)


@pytest.mark.parametrize("family", ["ar", "mdm"])
def test_wholes_are_completions(family, request):
    policy = request.getfixturevalue(family)
    output = drawn(policy)
    unit = {"steps": None} if family == "ar" else {"steps": 4}
    description = {"steps": None} if family == "ar" else {"steps": 2}
    plain = run(
        policy,
        description=DESCRIPTION.replace(temperature=1.0, **description),
        unit=UNIT.replace(temperature=1.0, **unit),
        generator=generator_for(0, "x"),
    )
    assert output.completions == plain.completions
    assert (output.nfe, output.token_forwards) == (plain.nfe, plain.token_forwards)
    assert output.completion_ids.shape == (2, 128)
    for text, ids in zip(output.completions, output.token_lists(), strict=True):
        assert ids[-1] == policy.tokenizer.eos_token_id
        assert policy.tokenizer.decode(ids[:-1], skip_special_tokens=False) == text
    assert output.logprobs.isnan().all()


def test_a_whole_must_fit(mdm):
    with pytest.raises(ValueError, match="exceeds max_new_tokens=20: raise it"):
        drawn(mdm, max_new_tokens=20)
    with pytest.raises(ValueError, match="no one trajectory"):
        drawn(mdm, record=True)


@pytest.mark.parametrize("family", ["ar", "mdm"])
def test_rl_on_the_hierarchy(family, request, tmp_path):
    """Rewards see the assembled wholes, and what is rewarded becomes likelier."""
    policy, seen = request.getfixturevalue(family), []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=128,
        logp_estimator="exact" if family == "ar" else "one_step",
    )
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    draw = Hierarchical(UNITS, description_tokens=4, unit_tokens=8, length=64, gap=3)
    before = policy.fingerprint()
    folder = train_grpo(policy, [reward], rows, config, draw=draw)
    assert all(text.startswith("one:") and "four:" in text for text in seen)
    assert policy.fingerprint() != before
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 2]
    with pytest.raises(FileExistsError, match=r"another run \(draw .Hierarchical"):
        train_grpo(policy, [reward], rows, config)
