"""Language models behind one interface: `load_policy` gives one by name."""

from mdmrl.policies.families import (
    AutoregressivePolicy,
    BlockDiffusionPolicy,
    MaskedDiffusionPolicy,
    Policy,
)
from mdmrl.policies.load import load_policy, load_tokenizer
from mdmrl.policies.lora import add_lora, merge_lora
from mdmrl.policies.network import no_progress_bars
from mdmrl.policies.text import Prompt, Prompts, as_messages, require_conversation, require_texts
