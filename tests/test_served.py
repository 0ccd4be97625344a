"""Completions by a server: one of the test's own, which a policy answers from, token by token."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import parity, random_policy

from mdmrl import GRPOConfig, SamplerConfig, evaluate, generate, load_policy, train_grpo
from mdmrl.config import InputError
from mdmrl.identity import described
from mdmrl.runs import read_rows
from mdmrl.sampling.served import Served

PROMPTS = ["What is fever?", "And rash, where?", "What is fever?"]


@contextmanager
def server(answer):
    """Its address, and the requests that `answer(asked) -> (status, body)` was given."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), asked))
            status, body = answer(asked)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@torch.no_grad()
def completed(policy, asked):
    """Ids and log-probabilities of one completion, the whole text computed again for each token."""
    ids, logps = [], []
    draw = torch.Generator().manual_seed(asked["seed"])
    while len(ids) < asked["max_tokens"]:
        hidden = policy.hidden_states(torch.tensor([asked["prompt"] + ids]))[0, -1]
        logp = policy.head(hidden).log_softmax(0)
        if asked["temperature"]:
            token = torch.multinomial((logp / asked["temperature"]).softmax(0), 1, generator=draw)
        else:
            token = logp.argmax()
        ids.append(int(token))
        logps.append(logp[ids[-1]].item())
        if ids[-1] in asked["stop_token_ids"]:
            break
    return ids, logps, "stop" if ids[-1] in asked["stop_token_ids"] else "length"


def vllm(policy):
    def answer(asked):
        ids, logps, reason = completed(policy, asked)
        tokens = [f"token_id:{i}" for i in ids]
        found = {"tokens": tokens, "token_logprobs": logps, "top_logprobs": [], "text_offset": []}
        choice = {"index": 0, "text": "", "finish_reason": reason, "logprobs": found}
        return 200, {"choices": [choice | {"token_ids": ids, "prompt_token_ids": asked["prompt"]}]}

    return answer


def changed(answer, change):
    """A server whose one choice is another."""

    def other(asked):
        status, body = answer(asked)
        (choice,) = body["choices"]
        change(choice)
        return status, body

    return other


@pytest.fixture
def named(ar, tmp_path):
    """An autoregressive policy that has a name, as what is loaded has."""
    ar.save_pretrained(tmp_path / "ar")
    return load_policy(tmp_path / "ar")


def greedily(length=6):
    return SamplerConfig(max_new_tokens=length)


@pytest.mark.parametrize("older", [False, True])
def test_greedy_completions_are_those_of_generate(named, older, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answer = changed(vllm(named), lambda choice: choice.pop("token_ids")) if older else vllm(named)
    expected = generate(named, PROMPTS, greedily())
    with server(answer) as (url, requests):
        found = Served(url, "tiny")(named, PROMPTS, greedily())
    assert torch.equal(found.sequences, expected.sequences)
    assert found.completions == expected.completions
    assert torch.equal(found.completion_mask, expected.completion_mask)
    real = found.completion_mask
    torch.testing.assert_close(found.logprobs[real], expected.logprobs[real], atol=1e-5, rtol=1e-4)
    assert {path for path, _, _ in requests} == {"/v1/completions"}
    assert {key for _, key, _ in requests} == {"Bearer secret"}
    asked = requests[0][2]
    assert asked["model"] == "tiny" and asked["return_token_ids"] and "top_k" not in asked
    assert tuple(asked["stop_token_ids"]) == named.end_token_ids


def test_equal_prompts_get_texts_of_their_own_and_a_generator_decides_which(named):
    config = SamplerConfig(max_new_tokens=6, temperature=1.0, top_k=50, top_p=0.9)
    with server(vllm(named)) as (url, requests):
        draw = Served(url, "tiny")
        one, two, other = (
            draw(named, PROMPTS, config, torch.Generator().manual_seed(seed)).completion_ids
            for seed in (1, 1, 2)
        )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[2])
    assert requests[0][2]["top_k"] == 50 and requests[0][2]["top_p"] == 0.9


def test_an_end_that_the_server_leaves_out_is_put_back(named):
    """As one that trims what it stopped at."""

    def trim(choice):
        choice["finish_reason"] = "stop"
        choice["token_ids"] = [5, 6]
        choice["logprobs"] = {"token_logprobs": [-1.0, -2.0], "tokens": ["a", "b"]}

    named.tokenizer.pad_token = "<|pad|>"
    with server(changed(vllm(named), trim)) as (url, _):
        found = Served(url, "tiny")(named, PROMPTS[:1], greedily())
    assert found.token_lists() == [[5, 6, named.end_token_ids[0]]]
    assert found.logprobs[0, :2].tolist() == [-1, -2] and found.logprobs[0, 2].isnan()


def test_evaluation_and_rollouts_of_grpo_go_through_it(tokenizer, tmp_path):
    policy = random_policy("ar", tokenizer)
    handed = []

    def refresh(policy):
        handed.append(policy.weights_fingerprint())

    config = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
    )
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    with server(vllm(policy)) as (url, requests):
        draw = Served(url, "tiny", refresh)
        folder = train_grpo(policy, [parity], rows, config, draw=draw)
        assert len(requests) == 8
        found = evaluate(policy, rows, greedily(), [parity], draw=draw)
        expected = evaluate(policy, rows, greedily(), [parity])
        assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(handed)) == 3  # before both updates and after them
    assert read_rows(folder / "metrics.jsonl")[1]["num_tokens"] > 0


def test_a_policy_that_changed_needs_a_way_to_its_server(named):
    draw = Served("http://127.0.0.1:9/v1", "tiny")
    with torch.no_grad():
        next(named.model.parameters()).add_(1)
    with pytest.raises(InputError, match="refresh=FUNCTION"):
        draw(named, PROMPTS, greedily())


def test_what_a_run_depends_on_is_the_model_not_where_it_is_served():
    assert described(Served("http://a/v1", "m")) == described(Served("http://b/v1", "m"))
    assert described(Served("http://a/v1", "m")) != described(Served("http://a/v1", "n"))


def test_what_no_server_does_is_refused(named, mdm):
    draw = Served("http://127.0.0.1:9/v1", "tiny")
    with pytest.raises(InputError, match="left to right; 'mdm' does not"):
        draw(mdm, PROMPTS, greedily())
    with pytest.raises(InputError, match="no denoising trajectory"):
        draw(named, PROMPTS, greedily(), record=True)


NO_SETTINGS = {"url": ["localhost:8000/v1", "file:///etc/passwd", None], "model": [None]}
NO_SETTINGS |= {"refresh": ["x"], "at_once": [0], "timeout": [0, -1, float("nan")]}


@pytest.mark.parametrize(("field", "value"), [(k, v) for k, vs in NO_SETTINGS.items() for v in vs])
def test_a_server_is_asked_by_settings_that_make_sense(field, value):
    with pytest.raises(InputError, match=rf"^{field}=.*: expected "):
        Served(**{"url": "http://a/v1", "model": "m", field: value})


def test_a_key_stands_in_no_error(named, monkeypatch):
    for key, message in (("secret\n", None), ("sec\nret", "OPENAI_API_KEY"), ("sécret", "OPENAI")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with server(vllm(named)) as (url, requests):
            if message is None:
                Served(url, "tiny")(named, PROMPTS[:1], greedily())
                assert requests[0][1] == "Bearer secret"
                continue
            with pytest.raises(InputError, match=message) as error:
                Served(url, "tiny")(named, PROMPTS[:1], greedily())
            assert "ret" not in str(error.value)


def raw(sent, seconds=0.0):
    """A server that writes these bytes, one after the other where it takes `seconds` for each."""

    @contextmanager
    def serving():
        with socket.create_server(("127.0.0.1", 0)) as door:

            def serve():
                line, _ = door.accept()
                with line, suppress(OSError):
                    line.recv(2**16)
                    for part in [sent] if not seconds else [bytes([byte]) for byte in sent]:
                        line.sendall(part)
                        time.sleep(seconds)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{door.getsockname()[1]}/v1"
            thread.join()

    return serving()


def test_an_answer_that_breaks_off_or_takes_too_long_is_named():
    broken = b"HTTP/1.1 500 Busy\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nhalf"
    with raw(broken) as url, pytest.raises(InputError, match="refuses with 500: Busy"):
        Served(url, "tiny")._post({})
    slow = b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 80  # a byte now and then, none of them late
    with raw(slow, 0.02) as url, pytest.raises(InputError, match=r"no whole answer in timeout"):
        Served(url, "tiny", timeout=0.5)._post({})


def lone(body):
    return lambda asked: (200, body)


def drop_ids(choice):
    del choice["token_ids"]
    choice["logprobs"]["tokens"] = ["fever"] * len(choice["logprobs"]["tokens"])


def older_with(tokens):
    """A server that gives these tokens and no ids."""

    def change(choice):
        del choice["token_ids"]
        choice["logprobs"]["tokens"] = tokens

    return change


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda asked: (404, {"message": "no model tiny"}), r'refuses with 404: {"message": "no m'),
        (lone(b"<html>"), "answers no JSON"),
        (lone({"error": "busy"}), r'answers {"error": "busy"}: expected one choice'),
        (
            lone({"choices": [{"text": "x", "finish_reason": "stop", "logprobs": None}]}),
            "one choice",
        ),
        (drop_ids, "gives no token ids: expected vLLM 0.10.2"),
        (lambda c: c["logprobs"]["token_logprobs"].pop(), "tokens with . log-probabilities"),
        (lambda c: c.update(finish_reason="abort"), "ended a text by 'abort' after . tokens"),
        (lone(b"[" * 100_000), "answers no JSON"),
        (lambda c: c["logprobs"].update(token_logprobs=None), "gives log-probabilities None"),
        (lambda c: c["logprobs"].update(token_logprobs=["-1"] * 6), "gives log-probabilities"),
        (lambda c: c.update(token_ids=["9"] * 6), "gives token ids .*expected whole numbers below"),
        (lambda c: c.update(token_ids=[9.5] * 6), "gives token ids"),
        (lambda c: c.update(token_ids=[-1] * 6), "gives token ids"),
        (lambda c: c.update(token_ids=[10**6] * 6), "gives token ids"),
        (lambda c: c.update(token_ids="abc"), "gives token ids"),
        (older_with(["token_id:x"] * 6), "gives no token ids"),
        (older_with([9] * 6), "gives no token ids"),
        (older_with(None), "gives no token ids"),
    ],
)
def test_what_goes_wrong_is_named(named, answer, message):
    if answer.__code__.co_varnames[:1] != ("asked",):
        answer = changed(vllm(named), answer)
    with server(answer) as (url, _), pytest.raises(InputError, match=message) as error:
        Served(url, "tiny")(named, PROMPTS[:1], greedily())
    assert str(error.value).startswith(f"the server of tiny at {url} ")
    assert "\n" not in str(error.value)


def test_no_server_is_named():
    with server(lone({})) as (url, _):
        pass
    with pytest.raises(InputError, match=r"does not answer: \[Errno 111\] Connection refused"):
        Served(url, "tiny")._post({})
