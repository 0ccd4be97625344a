"""LoRA through peft, with the thesis's settings.

The thesis adapts q_proj, v_proj and "the output layers" and claims 42 % trainable parameters. On
Qwen2.5-7B's shapes r = 48 on q_proj, v_proj, o_proj and lm_head is 32,243,712 parameters, 0.42 %:
a slipped percent, and the reading that fixes the targets.
"""

import warnings

import peft
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mdmrl.config import require, unknown
from mdmrl.policies.families import Policy
from mdmrl.runs import kept_random_state

# peft asks a model by a name that transformers is about to drop.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
THESIS_TARGETS = ["q_proj", "v_proj", "o_proj", "lm_head"]


def add_lora(
    policy: Policy,
    r: int = 48,
    lora_alpha: int = 128,
    lora_dropout: float = 0.05,
    target_modules: list[str] = THESIS_TARGETS,
    seed: int = 0,
) -> Policy:
    """Wrap `policy.model` in place with LoRA adapters (float32 over any base dtype).

    Initial adapter weights derive from `seed`; the global random state is left as it was. The
    reference is now the model without the adapter, as it stands.
    """
    require(
        not policy.uses_lora,
        "the policy has an adapter already: train that one, or merge_lora(policy) first",
    )
    require(r >= 1, f"r={r}: expected a rank of 1 or more")
    require(lora_alpha > 0, f"lora_alpha={lora_alpha}: expected a positive number")
    require(0 <= lora_dropout < 1, f"lora_dropout={lora_dropout}: expected [0, 1)")
    weights = (name.split(".") for name, _ in policy.model.named_parameters())
    modules = {name[-2] for name in weights}
    for name in target_modules if isinstance(target_modules, list) else ():
        if name.rpartition(".")[2] not in modules:
            raise unknown("target module", name, modules)
    settings = {"lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    config = peft.LoraConfig("CAUSAL_LM", r=r, target_modules=target_modules, **settings)
    with kept_random_state(policy.device):
        torch.manual_seed(seed)
        policy.model.name_or_path = policy.name  # for adapter_config.json
        policy.model = peft.get_peft_model(policy.model, config).eval()
    return policy


def merge_lora(policy: Policy) -> Policy:
    """Add the adapter to the weights it adapts, in place and in their dtype, and drop it; all of
    them are trainable again."""
    require(policy.uses_lora, "the policy has no adapter to merge")
    policy.model = policy.model.merge_and_unload().requires_grad_(True).eval()
    return policy


def thesis_lora_share() -> tuple[int, int]:
    """Trained and total parameters of Qwen2.5-7B with the thesis's LoRA, counted on its published
    shapes without any weights."""
    shape = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
    depth = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**shape, **depth, tie_word_embeddings=False))
    total = model.num_parameters()
    config = peft.LoraConfig("CAUSAL_LM", r=48, target_modules=THESIS_TARGETS)
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    return adapted.num_parameters(only_trainable=True), total
