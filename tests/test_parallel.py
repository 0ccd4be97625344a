"""Right solutions and what positions of one step know of each other, against the sampler itself."""

import random

import pytest
import torch

from mdmrl import SamplerConfig, generate, load_policy
from mdmrl.runs import generator_for
from mdmrl.study.parallel import agreement, right_solutions, text_logprobs
from mdmrl.tasks.countdown import draw, metric, solutions

PATH = SamplerConfig(
    max_new_tokens=12, steps=4, temperature=1.0, remasking="state_confidence", stop_at_end=False
)
ITEM = {"prompt": "3,5,7:15", "nums": [3, 5, 7], "target": 15}


@pytest.mark.parametrize("name", ["tiny-mdm-countdown", "tiny-ar-countdown-matched"])
def test_a_text_has_the_probability_with_which_the_sampler_drew_it(name):
    policy = load_policy(name)
    sampler = PATH if policy.denoises else SamplerConfig(max_new_tokens=12, temperature=1.0)
    prompts = ["8,13,14:35", "3,5,7:15"] * 8
    output = generate(policy, prompts, sampler, generator_for(0, "drawn"))
    ended = policy.is_end(output.completion_ids) | output.completion_mask
    drawn = output.logprobs
    if not policy.denoises:
        drawn, ended = drawn * output.completion_mask, policy.is_end(output.completion_ids)
    whole = ended.all(1) if policy.denoises else ended.any(1)  # end tokens alone behind the text
    assert whole.sum() > 4
    found = text_logprobs(policy, prompts, output.completions, sampler)
    torch.testing.assert_close(found[whole], drawn.sum(1)[whole], atol=5e-3, rtol=0)


def test_all_right_expressions_are_found_and_no_other():
    found = solutions(ITEM["nums"], ITEM["target"])
    assert found == sorted({*found}) and all(metric(text, ITEM) for text in found)
    assert {"5+7+3", "(3+7)+5", "3+(5+7)"} <= {*found}
    assert len(found) == 3 * 6  # of 3+5+7 each order, as it is and with brackets at either end
    _, row = draw(random.Random(1))
    assert row["completion"] in solutions(row["nums"], row["target"])


def test_entropy_is_that_of_which_right_text_is_drawn():
    policy = load_policy("tiny-mdm-countdown")
    (found,) = right_solutions(policy, [ITEM], PATH).to_dict("records")
    texts = solutions(ITEM["nums"], ITEM["target"])
    p = text_logprobs(policy, [ITEM["prompt"]] * len(texts), texts, PATH).double().exp()
    law = torch.distributions.Categorical(p)
    assert found == pytest.approx({"right": p.sum().item(), "entropy": law.entropy().item()})
    drawn = generate(policy, [ITEM["prompt"]] * 512, PATH, generator_for(1, "drawn")).completions
    share = sum(metric(text, ITEM) for text in drawn) / len(drawn)
    assert found["right"] == pytest.approx(share, abs=4 * (share * (1 - share) / 512) ** 0.5 + 0.01)


def test_agreement_looks_at_one_token_at_a_time():
    policy = load_policy("tiny-mdm-countdown")
    prompts, alone, together = ["8,13,14:35", "3,5,7:15"], [], []
    found = agreement(policy, prompts, PATH, seed=3)
    generator = generator_for(3, "agreement")
    output = generate(policy, prompts, PATH, generator, record=True)
    width = output.prompt_mask.shape[1]
    for row in range(2):
        x0, end = output.completion_ids[row], int(output.completion_mask[row].sum())
        shown = torch.full_like(x0, policy.mask_token_id)
        for step in output.trajectory:
            now = step.positions[step.rows == row].tolist()
            counted = [j for j in now if j < end]
            for j in counted if len(counted) > 1 else ():
                for beside, into in (([], alone), ([k for k in now if k != j], together)):
                    xt = shown.clone()
                    xt[beside] = x0[beside]
                    ids = torch.cat([output.sequences[row, :width], xt])[None]
                    real = torch.cat([output.prompt_mask[row], torch.ones(12, dtype=torch.bool)])
                    logits = policy.logits(ids, real[None])[0, width + j]
                    logits[policy.mask_token_id] = -torch.inf
                    into.append(logits.softmax(-1)[x0[j]].item())
            shown[now] = x0[now]
    means = [sum(x) / len(x) for x in (alone, together)]
    assert len(alone) > 4
    assert [found["alone"], found["together"]] == pytest.approx(means, abs=1e-5)
