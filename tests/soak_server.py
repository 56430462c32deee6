"""Many streaming requests at a time, for minutes: `python tests/soak_server.py --seconds 600 --out FILE`.

Requests have random prompts with common beginnings and random lengths, and a fifth of them is cancelled half-way, at
mlx_lm.server with the hook on, in this process and on loopback alone. Half of the time the cache is lossless: every
text must be that of the same request with mlx-lm's own cache and nobody beside it. The other half it is of 3 bits:
distributions are compared with those of the same tokens served alone, and these with exact ones. Nothing may fail, and
afterwards nothing may be left in memory but the model and the stored prompts. Exit status 1 otherwise.
"""

import argparse
import collections
import concurrent.futures
import functools
import gc
import importlib.resources
import json
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
from unittest import mock

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache
from serving import LocalServer

import vq_kvcache
from vq_kvcache import SpectralKVCache, make_prompt_cache
from vq_kvcache.demo import model_folder
from vq_kvcache.spectral.sealing import LAG

BEGINNINGS, PROMPTS = 4, 24  # texts that prompts begin with, and prompts in all
TOKENS = 48  # of an answer
CANCELLED = 0.2
JUDGED = 24  # answers whose distributions are compared
WINDOW = 64
PATIENCE = 900  # seconds: on two cores the prompts of 32 clients, read together, take minutes
LEFT_OVER = 4 << 20  # bytes that may be in use beyond what is accounted for: transforms, masks, allocator's rounding


def float32_copy(folder, target):
    """The model in float32, where a text does not depend on how many rows are multiplied at once."""
    shutil.copytree(folder, target)
    path = str(target / "model.safetensors")
    weights = {name: w.astype(mx.float32) for name, w in mx.load(path).items()}
    mx.eval(weights)
    mx.save_safetensors(path, weights)
    return target


def make_prompts(tokenizer, longest, seed):
    """Prompts of up to `longest` token ids: a common beginning, cut anywhere, and a passage of their own."""
    ids = tokenizer.encode((importlib.resources.files("vq_kvcache") / "data" / "demo.txt").read_text("utf-8"))
    generator, prompts = random.Random(seed), []
    begins = [ids[i * 1500 : i * 1500 + longest // 2] for i in range(BEGINNINGS)]
    for _ in range(PROMPTS):
        begin = generator.choice(begins)[: generator.randint(1, longest // 2)]
        start = generator.randrange(len(ids) - longest)
        prompts.append(begin + ids[start : start + generator.randint(1, longest // 2)])
    # The server encodes text: what does not come back the same is cut until it does.
    return [tokenizer.encode(tokenizer.decode(p)) for p in prompts]


class Load:
    """Clients that ask until time is up; what they saw."""

    def __init__(self, server, texts, clients, seconds, seed):
        self.server, self.texts, self.until = server, texts, time.monotonic() + seconds
        self.clients = clients
        self.seed, self.lock = seed, threading.Lock()
        self.counts, self.errors, self.answers = collections.Counter(), [], collections.defaultdict(collections.Counter)

    def run(self):
        with concurrent.futures.ThreadPoolExecutor(self.clients) as pool:
            list(pool.map(self._client, range(self.clients)))
        return self

    def _client(self, number):
        generator = random.Random(1000 * self.seed + number)
        client = self.server.client(timeout=PATIENCE)
        while time.monotonic() < self.until and self.server.alive:
            index, cancel = generator.randrange(len(self.texts)), generator.random() < CANCELLED
            try:
                text, count = self._ask(
                    client, self.texts[index], generator.randint(1, TOKENS // 2) if cancel else None
                )
            except Exception as error:  # a soak reports what failed, whatever it was
                with self.lock:
                    self.errors.append(repr(error)[:200])
                continue
            with self.lock:
                self.counts["cancelled" if cancel else "whole"] += 1
                self.counts["tokens"] += count
                if not cancel:
                    self.answers[index][text] += 1

    def _ask(self, client, prompt, stop_after):
        chunks = client.completions.create(
            model="default_model", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True
        )
        text, count = "", 0
        with chunks:
            for chunk in chunks:
                if chunk.choices:
                    text += chunk.choices[0].text
                    count += 1
                if stop_after is not None and count >= stop_after:
                    break
        return text, count


class Watch:
    """Keeps the distributions of some answers of the server's BatchGenerator: prompt, tokens, log-probabilities."""

    def __init__(self):
        self.open, self.done, self._original = {}, [], BatchGenerator.next
        self._insert = BatchGenerator.insert_segments

    def insert_segments(self, generator, segments, *args, **kwargs):
        uids = self._insert(generator, segments, *args, **kwargs)
        for uid in uids:
            if len(self.open) < 4 and len(self.done) < JUDGED and uid % 5 == 0:
                self.open[uid] = ([], [])
        return uids

    def next(self, generator):
        prompts, responses = self._original(generator)
        for r in responses:
            if r.uid not in self.open:
                continue
            tokens, distributions = self.open[r.uid]
            tokens.append(r.token)
            distributions.append(np.array(normalized(r.logprobs)))
            if r.finish_reason is not None:
                del self.open[r.uid]
                self.done.append((r.all_tokens[: len(r.all_tokens) - len(tokens)], tokens, distributions))
        for uid in [u for u in self.open if not generator._find_uids([u])]:
            del self.open[uid]  # cancelled
        return prompts, responses

    def patches(self):
        def inserting(generator, watch, *args, **kwargs):
            return watch.insert_segments(generator, *args, **kwargs)

        def going_on(generator, watch):
            return watch.next(generator)

        watch = self
        return [
            mock.patch.object(BatchGenerator, "insert_segments", functools.partialmethod(inserting, watch)),
            mock.patch.object(BatchGenerator, "next", functools.partialmethod(going_on, watch)),
        ]  # fmt: skip


def normalized(logits):
    """Log-probabilities in float32: those of float16 do not sum to one, by more than what is compared here."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def alone(model, caches, prompt, tokens, step=2048):
    """Log-probabilities [T, V] of an answer's tokens, fed one at a time after the prompt, this in pieces of `step`."""
    for start in range(0, len(prompt) - 1, step):
        mx.eval(model(mx.array([prompt[start : min(start + step, len(prompt) - 1)]]), cache=caches))
    x, rows = mx.array([prompt[-1:]]), []
    for token in tokens:
        row = normalized(model(x, cache=caches)[:, -1])
        mx.eval(row, [c.state for c in caches])
        rows.append(np.array(row[0]))
        x = mx.array([[token]])
    return np.stack(rows)


def kl(true, other):
    return float((np.exp(true) * (true - other)).sum(-1).mean())


def judge(folder, options, answers):
    """What batches change, beside what the codec changes: mean KL in nats, and how often the best token is the same.

    The codec's own error is that of benchmarks/quality.py: every token is read from codes, LAG tokens at a time. A
    prompt in one piece reads itself exact, one whose beginning was stored does not.
    """
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    rows = []
    with vq_kvcache.install(options):
        for prompt, tokens, held in answers:
            lone, own = (
                alone(model, make_prompt_cache(model, cache=options, tokenizer=tokenizer), prompt, tokens, step)
                for step in (2048, LAG)
            )
            exact = alone(model, [KVCache() for _ in model.layers], prompt, tokens)
            served = np.stack(held)
            best = [x.argmax(-1) for x in (served, lone, exact)]
            rows.append({
                "kl_of_batch_to_alone": kl(lone, served), "kl_of_codec": kl(exact, own),
                "kl_of_codec_prompt_in_one_piece": kl(exact, lone), "kl_of_codec_in_batch": kl(exact, served),
                "same_best_token_as_alone": (best[0] == best[1]).mean(),
                "same_best_token_alone_as_exact": (best[1] == best[2]).mean(),
            })  # fmt: skip
    return {"answers": len(rows), **{name: float(np.mean([row[name] for row in rows])) for name in rows[0]}}


def memory():
    """Bytes in use by MLX after everything that is not held is gone."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def settle(server):
    """One more request, after which the server notices what was cancelled and has nothing to do."""
    for _ in range(3):
        server.complete("The", max_tokens=2)
        time.sleep(0.5)


def soak(folder, options, texts, clients, seconds, seed):
    """One server and its load; {what happened}, the answers, and the watched distributions."""
    watch, before = Watch(), threading.active_count()
    patches = watch.patches() if not options.lossless else []
    for patch in patches:
        patch.start()
    try:
        with LocalServer(folder, options, "--prompt-cache-size", 16) as server:
            server.complete("The", max_tokens=2)
            own = memory() - server.prompt_cache.nbytes
            first = Load(server, texts, clients, seconds / 2, seed).run()
            settle(server)
            half = memory() - server.prompt_cache.nbytes
            second = Load(server, texts, clients, seconds / 2, seed + 1).run()
            settle(server)
            end, stored = memory() - server.prompt_cache.nbytes, server.prompt_cache.nbytes
            alive, batchable = server.alive, server.provider.is_batchable
    finally:
        for patch in patches:
            patch.stop()
    answers = collections.defaultdict(collections.Counter)
    for load in (first, second):
        for index, seen in load.answers.items():
            answers[index].update(seen)
    report = {
        "seconds": seconds, **{n: first.counts[n] + second.counts[n] for n in ("whole", "cancelled", "tokens")},
        "errors": (first.errors + second.errors)[:20], "alive": alive, "batched": batchable,
        "bytes_before": own, "bytes_at_half_time": half, "bytes_at_the_end": end, "bytes_of_stored_prompts": stored,
        "threads_left": threading.active_count() - before,
    }  # fmt: skip
    return report, answers, watch.done


def agreement(answers, expected):
    """How many whole answers there were, and how many of them were the expected text of their prompt."""
    total = sum(sum(seen.values()) for seen in answers.values())
    return {"answers": total, "equal": sum(seen[expected(i)] for i, seen in answers.items())}


def problems(report):
    """Sentences about what is not as it must be."""
    found = []
    for name in ("lossless", "three_bits"):
        part = report[name]
        checks = {
            f"{len(part['errors'])} requests failed": not part["errors"],
            "the server's thread died": part["alive"],
            "requests were not batched": part["batched"],
            "no answer was complete": part["whole"] > 0,
            "threads were left": part["threads_left"] <= 0,
            "memory was left in use": part["bytes_at_the_end"] <= part["bytes_before"] + LEFT_OVER,
            "memory grew": part["bytes_at_the_end"] <= part["bytes_at_half_time"] + LEFT_OVER,
        }
        found += [f"{name}: {sentence}" for sentence, fine in checks.items() if not fine]
    texts, distances = report["lossless"]["texts"], report["three_bits"]["distributions"]
    if texts["equal"] != texts["answers"]:
        found.append("lossless: a text was not that of the request alone")
    if not distances["kl_of_batch_to_alone"] <= distances["kl_of_codec"]:
        found.append("three_bits: a batch changes more than the codec does")
    return found


def main():
    """Run both halves; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--longest", type=int, default=700, help="tokens of a prompt")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        lossless = float32_copy(model_folder(), pathlib.Path(name) / "float32")
        model, tokenizer = mlx_lm.load(str(lossless))[:2]
        prompts = make_prompts(tokenizer, arguments.longest, arguments.seed)
        texts = [tokenizer.decode(p) for p in prompts]
        expected = functools.cache(lambda i: mlx_lm.generate(model, tokenizer, texts[i], max_tokens=TOKENS))
        exact = SpectralKVCache.with_options(lossless=True, window=WINDOW)
        options = SpectralKVCache.with_options(3.0, window=WINDOW)
        clients, half = arguments.clients, arguments.seconds / 2
        part, answers, _ = soak(lossless, exact, texts, clients, half, arguments.seed)
        report = {"clients": clients, "lossless": {**part, "texts": agreement(answers, expected)}}
        part, answers, watched = soak(model_folder(), options, texts, clients, half, arguments.seed + 2)
        distributions = judge(model_folder(), options, watched)
        report["three_bits"] = {**part, "texts_as_exact": agreement(answers, expected), "distributions": distributions}
    report["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["problems"] = problems(report)
    text = json.dumps(report, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    print(text)
    return int(bool(report["problems"]))


if __name__ == "__main__":
    sys.exit(main())
