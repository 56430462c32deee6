"""mlx_lm.server with the hook on, asked by the real `openai` client over loopback: in lossless mode every answer is
that of the server without it."""

import concurrent.futures
import json
import shutil
import threading

import mlx.core as mx
import pytest
from conftest import random_prompt, tiny_model
from mlx.utils import tree_flatten
from mlx_lm import server
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, LRUPromptCache
from serving import CALL, LocalServer, scripted_calls, served_folder, words_of

import vq_kvcache
from vq_kvcache import SpectralKVCache
from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.spectral import calibrate

LOSSLESS = SpectralKVCache.with_options(lossless=True, window=32)
TOKENS = 100
PROMPTS = [words_of(random_prompt(length, length)) for length in (250, 3, 90, 1, 130, 40, 300, 17)]


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return served_folder(model_folder, tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def texts(folder):
    """What the server without the hook answers to each prompt alone."""
    with LocalServer(folder) as plain:
        return [plain.complete(prompt, max_tokens=TOKENS) for prompt in PROMPTS]


@pytest.fixture
def hooked(folder):
    with LocalServer(folder, LOSSLESS) as running:
        yield running


def in_parallel(function, items):
    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


def test_batching_stays_on(hooked):
    assert hooked.provider.is_batchable


def test_one_request_after_another(hooked, texts):
    assert [hooked.complete(prompt, max_tokens=TOKENS) for prompt in PROMPTS] == texts
    whole = hooked.client().completions.create(
        model="default_model", prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0
    )
    assert whole.choices[0].text == texts[0]
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == TOKENS


def test_parallel_requests_are_one_batch(hooked, texts, monkeypatch):
    sizes = []
    original = BatchSpectralKVCache.update_and_fetch
    monkeypatch.setattr(
        BatchSpectralKVCache, "update_and_fetch",
        lambda self, keys, values: sizes.append(len(keys)) or original(self, keys, values),
    )  # fmt: skip
    assert in_parallel(lambda prompt: hooked.complete(prompt, max_tokens=TOKENS), PROMPTS) == texts
    assert max(sizes) > 3
    assert in_parallel(lambda prompt: hooked.complete(prompt, max_tokens=TOKENS), PROMPTS) == texts
    assert hooked.alive


def test_a_common_beginning_is_read_once(hooked, folder):
    """From what an earlier request left, copied and trimmed: into the window, into the codes, or not at all."""
    first = PROMPTS[6].split()
    prompts = [" ".join([*first[:keep], "w9", "w11"]) for keep in (150, 300, 10, 280, 60)]
    with LocalServer(folder) as plain:
        expected = [plain.complete(prompt, max_tokens=40) for prompt in prompts]
    hooked.complete(PROMPTS[6], max_tokens=TOKENS)
    for prompt, text in zip(prompts, expected, strict=True):
        done = hooked.client().completions.create(model="default_model", prompt=prompt, max_tokens=40, temperature=0)
        assert done.choices[0].text == text
        shared = len(prompt.split()) - 2
        assert shared <= done.usage.prompt_tokens_details.cached_tokens < shared + 2


def test_stored_prompts_keep_to_their_bytes(folder, texts, monkeypatch):
    """mlx-lm drops stored prompts whenever a request joins a batch; what ours say they take is what they take."""
    trims, original = [], LRUPromptCache.trim_to

    def trim_to(self, *, n_bytes):
        before = len(self)
        original(self, n_bytes=n_bytes)
        held = [c for lru in self._lru._lrus.values() for key in lru for c in self._trie.get(*key).prompt_cache]
        assert {type(c) for c in held} <= {SpectralKVCache}
        assert self.nbytes == sum(a.nbytes for c in held for a in c._storage.arrays) <= max(n_bytes, 0)
        trims.append((before - len(self), 1_000_000 - n_bytes))

    monkeypatch.setattr(LRUPromptCache, "trim_to", trim_to)
    with LocalServer(folder, LOSSLESS, "--prompt-cache-bytes", 1_000_000, "--prompt-cache-size", 50) as hooked:
        for _ in range(3):
            assert in_parallel(lambda prompt: hooked.complete(prompt, max_tokens=TOKENS), PROMPTS) == texts
        assert hooked.alive
    assert sum(dropped for dropped, _ in trims) > 0
    assert max(active for _, active in trims) > 0  # the batch's own bytes count too


def test_cancelled_requests_leave_the_others_alone(hooked, texts):
    started = threading.Barrier(4)

    def cancelled(prompt):
        chunks = hooked.client().completions.create(
            model="default_model", prompt=prompt, max_tokens=2000, temperature=0, stream=True
        )
        for count, _ in enumerate(chunks):
            if count == 10:
                started.wait(60)
                break
        chunks.close()

    def whole(prompt):
        started.wait(60)
        return hooked.complete(prompt, max_tokens=TOKENS)

    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        lost = [pool.submit(cancelled, words_of(random_prompt(n, n))) for n in (70, 200, 5)]
        kept = pool.submit(whole, PROMPTS[0])
        for future in lost:
            future.result()
        assert kept.result() == texts[0]
    assert hooked.complete(PROMPTS[1], max_tokens=TOKENS) == texts[1]
    assert hooked.alive


def test_draft_models(folder, texts):
    with LocalServer(folder, LOSSLESS, "--draft-model", folder, "--num-draft-tokens", 20) as hooked:
        assert not hooked.provider.is_batchable  # mlx-lm drafts for one request at a time
        assert [hooked.complete(prompt, max_tokens=TOKENS) for prompt in PROMPTS[:4]] == texts[:4]
        assert hooked.complete(PROMPTS[0], max_tokens=TOKENS) == texts[0]


PLACE = {"type": "object", "properties": {"place": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "w7", "description": "weather", "parameters": PLACE}}]


def conversation(server, ask):
    """Two questions and their answers, the second with the first before it."""
    messages = [{"role": "user", "content": PROMPTS[0]}]
    seen = [ask(server, messages)]
    messages += [{"role": "assistant", "content": seen[0][0]}, {"role": "user", "content": PROMPTS[5]}]
    return [*seen, ask(server, messages)]


def whole(server, messages):
    choice = server.answer(messages, tools=TOOLS, max_tokens=60)
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    return choice.message.content, calls, choice.finish_reason


def streamed(server, messages):
    text, calls, reason = "", [], None
    chunks = server.client().chat.completions.create(
        model="default_model", messages=messages, tools=TOOLS, max_tokens=60, temperature=0, stream=True
    )
    for chunk in chunks:
        if not chunk.choices:
            continue
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        calls += [(c.function.name, c.function.arguments) for c in choice.delta.tool_calls or []]
        reason = choice.finish_reason or reason
    return text, calls, reason


@pytest.mark.parametrize("ask", [whole, streamed])
def test_chats_with_tools(folder, ask):
    with LocalServer(folder) as plain:
        expected = conversation(plain, ask)
    with LocalServer(folder, LOSSLESS) as hooked:
        assert conversation(hooked, ask) == expected
    assert len(expected[0][0].split()) > 10


@pytest.mark.parametrize("ask", [whole, streamed])
def test_tool_calls(folder, ask):
    """A model that calls a tool where an answer begins: the call comes apart from the text, and its answer is read."""
    results = []
    for hook in (None, LOSSLESS):
        with scripted_calls(llama.Model), LocalServer(folder, hook) as running:
            messages = [{"role": "user", "content": PROMPTS[0]}]
            results.append([ask(running, messages)])
            messages += [
                {"role": "assistant", "content": "w9"},
                {"role": "tool", "content": "w11 w12"},
                {"role": "user", "content": PROMPTS[2]},
            ]
            results[-1].append(ask(running, messages))
    assert results[0] == results[1]
    for text, calls, reason in results[1]:
        assert [(name, json.loads(arguments)) for name, arguments in calls] == [("w7", {"place": "w8"})]
        assert reason == "tool_calls"
        assert CALL not in (text or "")


def test_many_threads_at_once(hooked, texts):
    """Of the client's, each with a connection of its own; the server generates in one, on a stream of its own."""
    answers = in_parallel(lambda prompt: hooked.complete(prompt, max_tokens=TOKENS), PROMPTS * 4)
    assert answers == texts * 4
    assert hooked.alive


@pytest.fixture(scope="module")
def draft_folder(folder, tmp_path_factory):
    """The served model with other weights, of which nobody has a codec."""
    target = tmp_path_factory.mktemp("draft") / "model"
    shutil.copytree(folder, target)
    mx.save_safetensors(str(target / "model.safetensors"), dict(tree_flatten(tiny_model(1).parameters())))
    return target


def test_the_servers_loader_is_put_back():
    original = server.ModelProvider.load
    with vq_kvcache.install(LOSSLESS):
        assert server.ModelProvider.load is not original
    assert server.ModelProvider.load is original


def test_a_draft_is_not_calibrated(folder, draft_folder, stored_codec, monkeypatch):
    """It keeps mlx-lm's own cache: guesses are short-lived, and only the target's tokens count."""

    def calibrated(model, *args, **kwargs):
        raise AssertionError("calibrated a draft")

    monkeypatch.setattr(calibrate, "calibrate_codec", calibrated)
    with LocalServer(folder, SpectralKVCache.with_options(2.0, window=32), "--draft-model", draft_folder) as hooked:
        assert len(hooked.complete(PROMPTS[0], max_tokens=30).split()) == 30
        assert hooked.alive
        lru = hooked.prompt_cache._lru._lrus.values()
        held = [hooked.prompt_cache._trie.get(*key).prompt_cache for kind in lru for key in kind]
    assert [[type(c) for c in caches] for caches in held] == [[SpectralKVCache] * 2 + [KVCache] * 2] * len(held) != []
