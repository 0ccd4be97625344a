"""Policies as others load them: merged weights in a published layout, or in transformers' own."""

import json
from pathlib import Path

from mdmrl.config import require, unknown
from mdmrl.policies.families import Policy
from mdmrl.policies.lora import merge_lora
from mdmrl.policies.network import no_progress_bars
from mdmrl.policies.published import PUBLISHED
from mdmrl.runs import write_atomically, written_aside

LAYOUTS = {"plain": None, "dream": "Dream", "llada": "llada"}


def export(policy: Policy, folder: str | Path, layout: str = "plain") -> None:
    """Write `policy` with its adapter merged in, which it is from then on.

    `load_policy` gives the same logits again. config.json of the layout of Dream or LLaDA names the
    code of that family, for those who run it; the native class of transformers, `plain`, has
    `"is_causal": false` in its config where a policy sees both sides.

    Raises:
        InputError: an unknown layout, a folder that holds something, or a policy that computes what
            the layout cannot say, such as an unshifted one in Dream's.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    folder, name = Path(folder), LAYOUTS[layout]
    new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(new, f"{folder} is not empty: expected a new folder to export to")
    if policy.uses_lora:
        merge_lora(policy)
    if name is None:
        with written_aside(folder.absolute()) as aside:
            policy.save_pretrained(aside)
        return
    family, model = PUBLISHED[name], policy.model
    require(
        type(model) is family.model,
        f"layout={layout!r} for a {type(model).__name__}: expected a {family.model.__name__}",
    )
    fields = family.published(model.config, name)
    weights = {family.published_name(n): weight for n, weight in model.state_dict().items()}
    with written_aside(folder.absolute()) as aside, no_progress_bars():
        model.save_pretrained(aside, state_dict=weights)
        policy.tokenizer.save_pretrained(aside)
        write_atomically(aside / "config.json", json.dumps(fields, indent=1) + "\n")
