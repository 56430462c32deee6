"""batch_generate and BatchGenerator with the hook on: in lossless mode every text is what mlx-lm writes of its prompt
alone; with a codec, what a batch holds is what a cache of its own would hold."""

import copy

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import kinds, numpy, random_prompt, tiny_model
from mlx_lm.generate import BatchGenerator, batch_generate
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache

import vq_kvcache
from vq_kvcache import SpectralKVCache, make_prompt_cache
from vq_kvcache.spectral import intercept

LOSSLESS = SpectralKVCache.with_options(lossless=True, window=32)
LENGTHS = (300, 5, 117, 1, 260, 90)
TOKENS = 140  # so that each row seals a block more than once, at other moments than the others


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(length, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def texts(model, tokenizer, prompts):
    """What mlx-lm writes after each prompt alone, and after that and two words more."""
    assert "make_cache" not in vars(model)
    return [mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS) for prompt in prompts]


@pytest.fixture
def hooked(model, tokenizer):
    vq_kvcache.attach(model, tokenizer, cache=LOSSLESS)
    return model


def tokens_of(generator, prompts, caches=None, counts=TOKENS):
    """All tokens of all prompts, and the prompt caches that come back."""
    counts = counts if isinstance(counts, list) else [counts] * len(prompts)
    uids = generator.insert(prompts, counts, caches=caches)
    return finish(generator, uids)


def finish(generator, uids):
    tokens, caches = {uid: [] for uid in uids}, {}
    while responses := generator.next_generated():
        for response in responses:
            if response.uid in tokens:
                tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                caches[response.uid] = response.prompt_cache
        if set(caches) >= set(uids):
            break
    return [tokens[uid] for uid in uids], [caches[uid] for uid in uids]


def ids(text):
    return [0 if word == "<unknown>" else int(word[1:]) for word in text.split()]


def test_every_text_of_a_batch_is_the_text_of_its_prompt_alone(hooked, tokenizer, prompts, texts):
    done = batch_generate(hooked, tokenizer, prompts, max_tokens=TOKENS, return_prompt_caches=True)
    assert done.texts == texts
    for prompt, caches in zip(prompts, done.caches, strict=True):
        assert [type(c) for c in caches] == [SpectralKVCache] * 2
        assert [c.offset for c in caches] == [len(prompt) + TOKENS] * 2


@pytest.mark.parametrize(("prefill", "completion", "step"), [(1, 2, 64), (2, 3, 16), (8, 32, 2048)])
def test_batches_of_any_size(hooked, prompts, texts, prefill, completion, step):
    """Prompts wait for places, join others half-way, and leave before them."""
    generator = BatchGenerator(hooked, prefill_batch_size=prefill, completion_batch_size=completion,
                               prefill_step_size=step)  # fmt: skip
    counts = [TOKENS, 3, 70, 20, 100, 1]
    tokens, caches = tokens_of(generator, prompts, counts=counts)
    assert tokens == [ids(text)[:count] for text, count in zip(texts, counts, strict=True)]
    assert [c[0].offset for c in caches] == [n + count for n, count in zip(LENGTHS, counts, strict=True)]
    generator.close()


def test_prompts_join_while_others_are_written(hooked, prompts, texts):
    generator = BatchGenerator(hooked)
    seen = {}
    for prompt in prompts:
        seen[generator.insert([prompt], [TOKENS])[0]] = []
        for _ in range(20):
            for response in generator.next_generated():
                seen[response.uid].append(response.token)
    while responses := generator.next_generated():
        for response in responses:
            seen[response.uid].append(response.token)
    assert list(seen.values()) == [ids(text) for text in texts]
    generator.close()


@pytest.mark.parametrize("first", [1, 30, 100])
def test_prompt_caches_that_come_back_go_on(hooked, prompts, texts, first):
    generator = BatchGenerator(hooked)
    tokens, caches = tokens_of(generator, prompts, counts=first)
    again = copy.deepcopy(caches)
    for held in (caches, again):  # used once, and once more from a copy
        rest, _ = tokens_of(generator, [t[-1:] for t in tokens], held, TOKENS - first)
        # The last token of the first part was written, not read: it is the prompt of the second.
        assert [c[0].offset for c in held] == [n + first for n in LENGTHS]
        held_tokens = [a[:first] + b for a, b in zip(tokens, rest, strict=True)]
        read = [prompt + t + t[-1:] for prompt, t in zip(prompts, tokens, strict=True)]
        assert held_tokens == [t + greedy(hooked, r, TOKENS - first) for t, r in zip(tokens, read, strict=True)]
    generator.close()


def greedy(model, prompt, count):
    """Greedy tokens after the prompt, with mlx-lm's own caches."""
    caches = vq_kvcache.hooks.own_caches(model)
    x, written = mx.array([prompt]), []
    for _ in range(count):
        written.append(int(model(x, cache=caches)[0, -1].argmax()))
        x = mx.array([written[-1:]])
    return written


def test_a_removed_prompt_gives_its_cache_back(hooked, prompts, texts):
    generator = BatchGenerator(hooked)
    uids = generator.insert(prompts, [TOKENS] * len(prompts))
    seen = {uid: [] for uid in uids}
    while len(seen[uids[0]]) < 30:
        for response in generator.next_generated():
            seen[response.uid].append(response.token)
    caches, tokens = generator.remove([uids[0], uids[3]], return_prompt_caches=True)[uids[0]]
    assert tokens[: len(prompts[0])] == prompts[0]
    assert [c.offset for c in caches] == [len(tokens)] * 2
    last = seen[uids[0]][-1:]
    assert tokens[len(prompts[0]) :] + last == seen[uids[0]] or tokens[len(prompts[0]) :] == seen[uids[0]]
    while responses := generator.next_generated():
        for response in responses:
            seen[response.uid].append(response.token)
    for row in (1, 2, 4, 5):
        assert seen[uids[row]] == ids(texts[row])
    generator.close()


def test_a_prefix_from_the_lru_cache_is_as_good_as_new(hooked, prompts, texts):
    """Stored by one request, found by one that shares a part of it, copied, trimmed and continued."""
    store = mlx_lm_cache.LRUPromptCache(max_size=4)
    generator = BatchGenerator(hooked)
    tokens, caches = tokens_of(generator, prompts, counts=TOKENS)
    key = [p + t for p, t in zip(prompts, tokens, strict=True)]
    store.insert_cache("model", key[0], caches[0])
    assert store.nbytes == sum(c.nbytes for c in caches[0])
    for shared in (299, 250, 120, 3):
        wanted = prompts[0][:shared] + prompts[1]
        found, rest = store.fetch_nearest_cache("model", wanted)
        assert rest == wanted[shared:]
        assert [c.offset for c in found] == [shared] * 2
        assert caches[0][0].offset == len(key[0])  # the one in store is as it was
        ours, _ = tokens_of(generator, [rest], [found], 80)
        assert ours[0] == greedy(hooked, wanted, 80)
    generator.close()


def test_batches_of_models_with_other_caches_beside_ours(tokenizer, prompts):
    """Sliding layers keep mlx-lm's, and one full layer too: it is given the mask of ours, and ours is given its."""
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    mixed = tiny_model(num_hidden_layers=4, layer_types=types, sliding_window=16)
    expected = [mlx_lm.generate(mixed, tokenizer, prompt, max_tokens=60) for prompt in prompts]
    for plain in (0, 2):
        caches = [make_prompt_cache(mixed, cache=LOSSLESS) for _ in prompts]
        for own in caches:
            assert kinds(own) == [SpectralKVCache, RotatingKVCache, SpectralKVCache, SpectralKVCache]
            own[plain] = KVCache()
        with intercept.dispatching():
            done = batch_generate(mixed, tokenizer, prompts, caches, max_tokens=60)
        assert done.texts == expected


def test_with_a_codec_a_row_is_what_a_cache_of_its_own_is(model, tokenizer, codec, prompts):
    """The same logits, until the first of the rows is sealed at another moment than a cache alone."""
    options = SpectralKVCache.with_options(3.0, window=32, codec=codec)
    vq_kvcache.attach(model, tokenizer, cache=options)
    singles = [make_prompt_cache(model, cache=options) for _ in prompts]
    for prompt, caches in zip(prompts, singles, strict=True):
        mx.eval(model(mx.array([prompt]), cache=caches))
    batch = [one[0].merge(list(one)) for one in zip(*singles, strict=True)]
    assert batch[0]._storage.packed_tokens == (192, 0, 64, 0, 192, 0)
    steps = 0
    while all(b == c[0]._storage.packed_tokens for b, c in zip(batch[0]._storage.packed_tokens, singles, strict=True)):
        x = mx.array([random_prompt(len(prompts), steps)]).T
        ours = model(x, cache=batch)
        theirs = [model(x[row : row + 1], cache=c) for row, c in enumerate(singles)]
        if all(b == c[0]._storage.packed_tokens for b, c in zip(batch[0]._storage.packed_tokens, singles, strict=True)):
            np.testing.assert_allclose(numpy(ours), numpy(mx.concatenate(theirs)), atol=1e-3)
        steps += 1
    assert steps > 5
