"""Completions by a server that holds the policy: vLLM, SGLang, or what else speaks their dialect of
OpenAI's `/completions`.

Token ids go there and come back (`return_token_ids`: vLLM from 0.10.2, SGLang from July 2026; of
older vLLMs `return_tokens_as_token_ids`), since text encoded again need not give the tokens that
were drawn. Log-probabilities are the server's: vLLM's are of temperature 1 unless it was started
with `--logprobs-mode processed_logprobs`.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Generator

from mdmrl.config import InputError, require
from mdmrl.policies import Policy, Prompt
from mdmrl.runs import generator_for
from mdmrl.sampling.config import SamplerConfig
from mdmrl.sampling.output import SamplerOutput

AS_TOKEN = re.compile(r"token_id:([0-9]{1,18})")  # how older vLLMs write one


@dataclass(frozen=True)
class Served:
    """`generate` by a server, for `evaluate` and `train_grpo`; of an autoregressive policy.

    Every completion is a request of its own, with a seed of its own: servers begin each prompt of a
    request with the same one. A key is read from `OPENAI_API_KEY`.

    Attributes:
        url: the server's, such as "http://localhost:8000/v1". model: its name for the policy.
        refresh: called with the policy before each draw, to give the server its weights (SGLang's
            `/update_weights_from_disk`, or an adapter by `/v1/load_lora_adapter`). Without one, a
            policy that has changed since it was loaded is refused.
        at_once: requests under way. timeout: seconds that one may take.
    """

    url: str
    model: str
    refresh: Callable[[Policy], None] | None = None
    at_once: int = 64
    timeout: float = 600.0

    def __post_init__(self) -> None:
        url, scheme = self.url, str(self.url).partition("://")[0]
        wanted = "expected an address, as http://localhost:8000/v1"
        require(isinstance(url, str) and scheme in ("http", "https"), f"url={url!r}: {wanted}")
        require(isinstance(self.model, str), f"model={self.model!r}: expected its name there")
        fit = self.refresh is None or callable(self.refresh)
        require(fit, f"refresh={self.refresh!r:.80}: expected a function of the policy")
        require(self.at_once >= 1, f"at_once={self.at_once}: expected 1 or more")
        require(0 < self.timeout < 1e6, f"timeout={self.timeout}: expected seconds, more than 0")

    def fingerprint(self) -> str:
        """What a run's identity depends on: not where the server is."""
        return f"served {self.model}"

    def __call__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        config: SamplerConfig | None = None,
        generator: Generator | None = None,
        record: bool = False,
    ) -> SamplerOutput:
        """Complete `prompts`; see `mdmrl.sampling.generate`.

        Raises:
            InputError: a policy or an option that no such server has, one whose weights the server
                cannot have, and an answer that cannot be used.
        """
        config = config or SamplerConfig()
        generator = generator or generator_for(0, "generate", device=policy.device)
        require(not policy.denoises, f"a server completes left to right; {policy.kind!r} does not")
        require(not record, "record=True: an autoregressive policy has no denoising trajectory")
        config.refuse_denoising_options()
        require(
            self.refresh is not None or policy.name is not None,
            "the policy is not as it was loaded, and the server cannot know: give Served(..., "
            "refresh=FUNCTION), which hands it the weights",
        )
        if self.refresh is not None:
            self.refresh(policy)
        encoded = policy.encode(prompts, config.max_new_tokens)
        pairs = zip(encoded.input_ids, encoded.attention_mask, strict=True)
        rows = [ids[real].tolist() for ids, real in pairs]
        shape, device = (len(rows), config.max_new_tokens), policy.device
        seeds = torch.randint(2**31, shape[:1], generator=generator, device=device).tolist()
        ends, known = policy.end_token_ids, len(policy.model.get_input_embeddings().weight)

        def one(row: list[int], seed: int) -> tuple[list[int], list[float]]:
            return self._completion(row, seed, ends, config, known)

        pool = ThreadPoolExecutor(self.at_once)
        try:
            found = [*pool.map(one, rows, seeds)]
        finally:  # where one has failed, or by Ctrl-C, nobody waits for the others
            pool.shutdown(wait=False, cancel_futures=True)
        completion = torch.full(shape, policy.pad_token_id, device=device)
        logprobs = torch.zeros(shape, device=device)
        for row, (ids, logps) in enumerate(found):
            completion[row, : len(ids)] = torch.tensor(ids, device=device)
            logprobs[row, : len(ids)] = torch.tensor(logps, device=device)
        written = [len(ids) for ids, _ in found]
        costs = {
            "nfe": max(written),
            "token_forwards": sum(map(len, rows)) + sum(written) - len(rows),
        }
        sequences = torch.cat([encoded.input_ids, completion], 1)
        return SamplerOutput.of(policy, sequences, encoded.attention_mask, logprobs, **costs)

    def _completion(
        self, prompt: list[int], seed: int, ends: tuple[int, ...], config: SamplerConfig, rows: int
    ) -> tuple[list[int], list[float]]:
        """Token ids of one completion, its end among them, all below `rows`, and their
        log-probabilities."""
        asked = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": seed,
            "stop_token_ids": list(ends),
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        asked |= {"top_k": config.top_k} if config.top_k else {}
        answer = self._post(asked)
        try:
            (choice,) = answer["choices"]
            logps, tokens = (choice["logprobs"][name] for name in ("token_logprobs", "tokens"))
            ids, reason = choice.get("token_ids"), choice["finish_reason"]
        except (KeyError, TypeError, ValueError):
            raise self._error(f"answers {json.dumps(answer)[:200]}: expected one choice") from None
        said = f"gives log-probabilities {logps!r:.80}: expected a list of numbers, one a token"
        self._require(isinstance(logps, list) and all(map(_is_logprob, logps)), said)
        if ids is None:
            found = [AS_TOKEN.fullmatch(str(token)) for token in tokens or ()]
            as_ids = isinstance(tokens, list) and all(found)
            self._require(as_ids, "gives no token ids: expected vLLM 0.10.2, a newer SGLang")
            ids = [int(token[1]) for token in found]
        fit = isinstance(ids, list) and all(type(i) is int and 0 <= i < rows for i in ids)
        self._require(fit, f"gives token ids {ids!r:.80}: expected whole numbers below {rows}")
        counts = f"{len(ids)} tokens with {len(logps)} log-probabilities"
        self._require(len(ids) == len(logps), f"gives {counts}")
        if reason == "stop" and not (ids and ids[-1] in ends):  # which some leave out
            ids, logps = [*ids, ends[0]], [*logps, float("nan")]
        whole = reason == "stop" or (reason == "length" and len(ids) == config.max_new_tokens)
        most = f"max_new_tokens={config.max_new_tokens}"
        fit = whole and len(ids) <= config.max_new_tokens
        self._require(fit, f"ended a text by {reason!r} after {len(ids)} tokens with {most}")
        return ids, [float("nan") if logp is None else logp for logp in logps]

    def _post(self, asked: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            require(key.isascii() and key.isprintable(), "OPENAI_API_KEY holds what no header can")
            headers["Authorization"] = f"Bearer {key}"
        place, body = f"{self.url.rstrip('/')}/completions", json.dumps(asked).encode()
        ends, parts = time.monotonic() + self.timeout, []
        try:
            request = urllib.request.Request(place, body, headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                while part := answer.read1(2**16):
                    parts.append(part)
                    if time.monotonic() > ends:
                        raise TimeoutError(f"no whole answer in timeout={self.timeout} seconds")
        except urllib.error.HTTPError as error:
            said = ""
            with suppress(OSError, http.client.HTTPException):  # it may break off
                said = " ".join(error.read(400).decode(errors="replace").split())
            raise self._error(f"refuses with {error.code}: {said or error.reason}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = getattr(error, "reason", None) or error or type(error).__name__
            raise self._error(f"does not answer: {said}") from None
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise self._error(f"answers no JSON: {error}") from None

    def _require(self, fit: bool, said: str) -> None:
        if not fit:
            raise self._error(said)

    def _error(self, said: str) -> InputError:
        return InputError(f"the server of {self.model} at {self.url} {said}")


def _is_logprob(value) -> bool:
    """Of a token, or null where a server knows none."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
