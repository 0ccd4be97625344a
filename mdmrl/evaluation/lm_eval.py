"""The study's policies in EleutherAI's lm-evaluation-harness (optional extra `lm-eval`):

    lm_eval --model mdmrl --model_args policy=tiny-mdm,steps=32 --tasks ...

`generate_until` draws with the sampler of the policy's family; `loglikelihood` is that of
`mdmrl.evaluation.likelihood`, exact for an autoregressive policy and the ELBO for a denoiser.
"""

import copy
from collections import defaultdict

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mdmrl.config import require
from mdmrl.evaluation.likelihood import Pair, log_likelihoods, whole_blocks
from mdmrl.policies import Policy, Prompts, load_policy
from mdmrl.runs import generator_for
from mdmrl.sampling import SamplerConfig, generate


@register_model("mdmrl")
class PolicyLM(TemplateLM):
    """A policy as the harness's `LM`.

    Texts are taken as they stand: `--apply_chat_template` has them rendered before, and without it
    a policy with a chat template too continues plain text. A context too long for the policy loses
    its beginning, as with the harness's own models.

    Args:
        policy: a policy, or what `load_policy` takes, like device, dtype, adapter and family.
        batch_size: canvases in one forward pass.
        n_mc: masked sets a denoiser's log-likelihoods are estimated with; see `log_likelihoods`.
        seed: of sampling and of the masked sets.
        sampler: fields of `SamplerConfig`, for what neither the task nor `--gen_kwargs` says.
    """

    def __init__(
        self,
        policy: Policy | str,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "float32",
        adapter: str | None = None,
        family: str | None = None,
        n_mc: int = 128,
        seed: int = 0,
        **sampler,
    ):
        super().__init__()
        for name, value in {"batch_size": batch_size, "n_mc": n_mc}.items():
            wanted = f"{name}={value!r}: expected a number of at least 1"
            require(str(value).isdigit() and int(value) >= 1, wanted)
        if not isinstance(policy, Policy):
            device = "auto" if device == "cuda:0" else device  # the harness's, card or none
            how = {"device": device, "dtype": dtype, "adapter": adapter, "family": family}
            policy = load_policy(policy, **how)
        self.tokenizer, self.policy = policy.tokenizer, copy.copy(policy)
        self.policy.encode = self._encode  # by which every sampler takes its prompts
        self.batch_size, self.n_mc, self.seed = int(batch_size), int(n_mc), seed
        self.sampler = SamplerConfig(**{"max_new_tokens": 256} | sampler)

    # -- text --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.policy.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = begin is None or not string.startswith(begin)
        return self.policy.tokenize([string], add_special_tokens)[0]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=False,
        )

    def _encode(self, prompts: list[str], max_new_tokens: int) -> Prompts:
        room = self.policy.context_length - max_new_tokens
        require(
            room >= 1,
            f"max_gen_toks={max_new_tokens} leave no room for a prompt in a context of "
            f"{self.policy.context_length} tokens: lower it by --gen_kwargs max_gen_toks=N",
        )
        return self.policy.pad(
            [self.tok_encode(p)[-room:] or [self.prefix_token_id] for p in prompts]
        )

    # -- generate_until ----------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        found, alike = [""] * len(requests), defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        size = self.batch_size
        batches = [g[i : i + size] for g in alike.values() for i in range(0, len(g), size)]
        for batch in tqdm(batches, "generate_until", disable=disable_tqdm or None):
            config, limit, until = self._asked(requests[batch[0]].args[1])
            generator = generator_for(self.seed, "lm-eval", 0, batch[0], self.policy.device)
            prompts = [requests[number].args[0] for number in batch]
            output = generate(self.policy, prompts, config, generator)
            ids, mask = output.completion_ids[:, :limit], output.completion_mask[:, :limit]
            for number, text in zip(batch, self.policy.decode(ids, mask), strict=True):
                for stop in filter(None, until):
                    text = text.split(stop)[0]
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _asked(self, gen_kwargs: dict) -> tuple[SamplerConfig, int, list[str]]:
        """The sampler that a request means, how many of its tokens count, and what ends a text."""
        given = normalize_gen_kwargs(gen_kwargs, self.sampler.max_new_tokens)
        until, limit, draws = (given.pop(name) for name in ("until", "max_gen_toks", "do_sample"))
        if draws:
            given.setdefault("temperature", self.sampler.temperature or 1.0)
        elif gen_kwargs.keys() & {"do_sample", "temperature"}:
            given |= {"temperature": 0.0, "top_k": None, "top_p": 1.0}
        whole = whole_blocks(self.policy, limit)
        return self.sampler.replace(max_new_tokens=whole, **given), limit, until

    # -- loglikelihood -----------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows as long as the policy's context."""
        block = self.policy.block_length or 1
        longest = (self.policy.context_length - 1) // block * block
        windows, of = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, longest, 1):
                windows.append((None, *make_disjoint_window(pair)))
                of.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (value, _) in zip(of, found, strict=True):
            totals[number] += value
        return totals

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        how = (self.n_mc, self.seed, self.batch_size)
        return log_likelihoods(self.policy, pairs, *how, progress=not disable_tqdm)

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """Without the beginning of the context, where both exceed the policy's."""
        room = self.policy.context_length - whole_blocks(self.policy, len(continuation))
        require(
            len(continuation) >= 1 and room >= 1,
            f"a continuation of {len(continuation)} tokens: expected at least 1, and fewer than "
            f"the {self.policy.context_length} of the policy's context",
        )
        return context[-room:], continuation
