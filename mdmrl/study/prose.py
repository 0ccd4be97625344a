"""Training on prose, MedCoT: the arms of Fig. 4-1 to 4-3, and the real model beside them."""

from collections.abc import Sequence
from itertools import product

from mdmrl.study.training import Arm

REWARD_CEILING = 2.8  # the thesis's count: accuracy 2, depth 0.2, format 0.6
FEW_STEPS = 16  # denoising steps at which appendix C looks at completions


def medcot_arms(
    autoregressive: str,
    masked_diffusion: str,
    estimators: Sequence[str],
    steps: Sequence[int],
    eval_prompts: int,
    settings: dict,
) -> dict[str, Arm]:
    """The arms of Fig. 4-1 and 4-2 by name: the autoregressive model, and the masked diffusion
    model for each estimator and number of denoising steps; every weight is trained.

    `settings` are GRPOConfig's that all arms share. A [MASK] that is drawn stays, as with Dream.
    """

    def arm(name: str, policy: str, final_steps: list[int], **own) -> Arm:
        shared = {"final_steps": final_steps, "eval_prompts": eval_prompts}
        return Arm(name=name, policy=policy, settings=settings | own, **shared)

    length = settings["max_completion_length"]
    arms = {"AR": arm("AR", autoregressive, [length], logp_estimator="exact")}
    for estimator, count in product(estimators, steps):
        name = f"MDM {estimator}, {count} steps"
        sampler = {"remasking": "low_confidence", "suppress_mask": False, "steps": count}
        own = {"logp_estimator": estimator, "sampler": sampler}
        arms[name] = arm(name, masked_diffusion, [FEW_STEPS, length], **own)
    return arms


def real_arm(policy: str, dtype: str, **settings) -> Arm:
    """A real pretrained autoregressive model with the thesis's settings; its weights in `dtype`."""
    thesis = {"learning_rate": 5e-6, "ref_model_sync_steps": 500, "logp_estimator": "exact"}
    thesis |= {"kl_estimator": "k3", "beta": 1.0, "epsilon": 0.1}
    lora = {"r": 48, "lora_alpha": 128, "lora_dropout": 0.05}
    own = {"lora": lora, "settings": thesis | settings, "instruct": True, "eval_prompts": 0}
    return Arm(name=policy, policy=policy, dtype=dtype, **own)
