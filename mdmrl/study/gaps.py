"""Spans of programs filled in from both sides, as only a masked diffusion model can: the canvas is
a whole body with a hole in it, and the prompt is the head, as in training. The hole has as many
tokens as the span that was cut out, which is told to nobody else."""

from collections.abc import Sequence

from mdmrl.policies import Policy
from mdmrl.sampling import SamplerConfig, infill


def filled(
    policy: Policy, rows: Sequence[dict], canvas: int, config: SamplerConfig | None = None
) -> list[str]:
    """What stands in the holes of `rows`, items of the task `code` with `infilling`; end tokens
    fill the canvas behind the body, as in training."""
    tokenizer, texts = policy.tokenizer, []
    heads = [[{"role": "user", "content": row["signature"]}] for row in rows]
    for row, prompt in zip(rows, policy.render(heads, True), strict=True):
        before, after = row["prefix"].removeprefix(row["signature"]), row["suffix"]
        sizes = [len(ids) for ids in policy.tokenize([before, row["completion"], after])]
        ending = tokenizer.eos_token * max(1, canvas - sum(sizes))
        texts.append(f"{prompt}{before}{tokenizer.mask_token * sizes[1]}{after}{ending}")
    output = infill(policy, texts, config)
    holes = policy.encode_texts(texts).input_ids == policy.mask_token_id
    spans = [ids[hole] for ids, hole in zip(output.completion_ids, holes, strict=True)]
    return [tokenizer.decode(span, skip_special_tokens=True) for span in spans]
