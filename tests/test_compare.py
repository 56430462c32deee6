"""compare: its figures against computations of their own, its marks, its refusals, and the page it writes."""

import copy
import html.parser
import itertools
import json
import re
import warnings

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from conftest import VOCABULARY, random_codec, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from vq_kvcache import cli, compare, hooks, make_prompt_cache, measuring
from vq_kvcache.cache import CacheOptions
from vq_kvcache.drift import UNLIKE
from vq_kvcache.report_page import SECTIONS, page
from vq_kvcache.spectral.codec import Codec, fingerprint
from vq_kvcache.spectral.sealing import scored_mass

IDS = np.random.default_rng(5).integers(2, VOCABULARY, 700).tolist()
PROMPT = IDS[:300]
CONTEXTS = [256, 512, 768]
REQUEST = compare.Request("words", IDS[:1], IDS[1:], "w1 w2", PROMPT, [1.0, 2.0], CONTEXTS, 699, 12)
NATS = {"objective": "fisher", "sequences": 1, "text": "built-in", "sequence_length": 256, "window": 64, "sinks": 4}
NAMES = [measuring.FULL, measuring.MLX, "spectral 1", "spectral 2"]


@pytest.fixture(scope="module")
def nats(codec):
    return Codec(codec.fingerprint, codec.layers, NATS)


@pytest.fixture(scope="module")
def report(model, tokenizer, nats):
    """A whole comparison of the tiny model; as it is read from the JSON file."""
    made = compare.compare("tiny", model, tokenizer, nats, REQUEST)
    hooks.uninstall()
    return json.loads(json.dumps(made))


def fed(model, caches, quantized=False):
    """Log-probabilities of all positions beyond the first piece, in float64, through caches fed as in decoding."""
    rows = []
    for start, end in itertools.pairwise([0, *range(256, 700, 16), 700]):
        logits = np.array(model(mx.array([IDS[start:end]]), cache=caches)[0], dtype=np.float64)
        if quantized:
            maybe_quantize_kv_cache(caches, 0, 32, 4)
        if start:
            rows.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", NAMES)
def test_quality_is_that_of_its_definition(name, report, model, nats):
    whole = np.array(model(mx.array([IDS]))[0], dtype=np.float64)[256:]
    expected = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
    if "spectral" in name:
        caches = make_prompt_cache(model, cache=CacheOptions(float(name.split()[1]), codec=nats))
    else:
        caches = hooks.own_caches(model)
    found = fed(model, caches, quantized=name == measuring.MLX)
    kl = (np.exp(expected) * (expected - found)).sum(-1)
    row = next(m for m in report["methods"] if m["name"] == name)
    assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
    assert row["kl_standard_error"] == pytest.approx(kl.std(ddof=1) / len(kl) ** 0.5, rel=1e-3, abs=1e-6)
    assert row["kl_999"] == pytest.approx(np.quantile(kl, 0.999), rel=1e-3, abs=1e-5)
    assert row["top1"] == pytest.approx((expected.argmax(-1) == found.argmax(-1)).mean(), abs=1e-9)
    losses = [-found[i, IDS[256 + i + 1]] for i in range(len(found) - 1)]
    assert row["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
    assert row["positions"] == 700 - 256
    if name != measuring.FULL:
        assert row["kl"] > 1e-3
    drifts = [cache.drift for cache in caches if row["kind"] == "spectral"]
    assert (row["drift"] is None) == (drifts == [])
    if drifts:
        assert row["drift"]["energy"] == pytest.approx(max(d.energy for d in drifts), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_continuations_are_the_greedy_texts_of_their_caches(name, report, model, tokenizer, nats):
    options = {"prompt_cache": hooks.own_caches(model)}
    if name == measuring.MLX:
        options |= {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    elif name != measuring.FULL:
        options = {"cache": CacheOptions(float(name.split()[1]), codec=nats)}
    own = hooks.generate(model, tokenizer, PROMPT, max_tokens=12, prefill_step_size=256, **options)
    row = next(m for m in report["methods"] if m["name"] == name)["continuation"]
    assert row["text"].split() == own.split()
    reference = report["methods"][0]["continuation"]["text"].split()
    same = [a == b for a, b in zip(reference, own.split(), strict=True)]
    assert row["same_tokens"] == (same.index(False) if False in same else 12)
    assert "".join(words for kind, words in row["pieces"] if kind != "missing") == row["text"]


def test_bytes_are_those_of_caches_that_read_the_text_themselves(report, model, nats):
    for row in report["methods"]:
        for context in CONTEXTS:
            if row["kind"] == "spectral":
                caches = make_prompt_cache(model, cache=CacheOptions(float(row["name"].split()[1]), codec=nats))
            else:
                caches = hooks.own_caches(model)
            for start in range(0, context, 128):
                model(mx.array([(IDS + IDS)[start : start + 128]]), cache=caches)
                if row["kind"] == "mlx":
                    maybe_quantize_kv_cache(caches, 0, 32, 4)
            at = row["held"][str(context)]
            assert at["nbytes"] == sum(c.nbytes for c in caches), (row["name"], context)
            assert at["nbytes"] <= at["active_bytes"] <= at["decode_peak"] + 20_000
            assert at["decode_tokens_per_second"] > 0
            assert at["read_tokens_per_second"] > 0
            assert at["read_peak"] > at["nbytes"] / 2


def test_the_largest_context_is_the_last_that_fits():
    held = {1000: (5_000_000, 6_000_000), 3000: (9_000_000, 10_500_000)}
    found = measuring.largest_context(100_000_000, 7_000_000, 500_000, held, bounded=True)
    assert (found["per_token"], found["working_per_token"]) == (2000, 0)
    assert found["fixed"] == 9_000_000 - 3000 * 2000

    def needed(tokens):
        return 7_000_000 + 500_000 + 3_000_000 + 1_500_000 + 2000 * tokens

    assert needed(found["tokens"]) <= 100_000_000 < needed(found["tokens"] + 1)
    assert measuring.largest_context(1000, 7_000_000, 0, held, bounded=True)["tokens"] == 0
    for bounded in (True, False):
        one = {1000: (5_000_000, 5_000_000)}
        assert measuring.largest_context(10_000_000, 0, 0, one, bounded=bounded)["tokens"] == 2000


def test_working_memory_that_grows_with_the_context_takes_room_from_it():
    held = {1000: (5_000_000, 5_300_000), 3000: (9_000_000, 9_700_000)}  # 100,000 and 200 a token
    found = measuring.largest_context(100_000_000, 7_000_000, 0, held, bounded=False)
    assert (found["working_per_token"], found["working"]) == (200, 100_000)
    assert found["tokens"] == (100_000_000 - 7_000_000 - 3_000_000 - 100_000) // 2200


def test_only_drift_is_left_to_the_report_other_warnings_are_told(monkeypatch, model, tokenizer, nats):
    def warned(*_):
        warnings.warn(f"{UNLIKE} (so and so)", stacklevel=1)
        warnings.warn("the kernels do not work here", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr(measuring, "methods", warned)
    with pytest.warns(UserWarning, match="kernels") as told, pytest.raises(ValueError, match="enough"):
        compare.compare("tiny", model, tokenizer, nats, REQUEST)
    assert [str(w.message) for w in told] == ["the kernels do not work here"]


def test_bits_are_those_of_all_numbers_alike():
    plan = random_codec(layers=1, heads=2, key_dims=64, value_dims=16).plan((4.0, 1.0))
    keys, values = plan.layers[0].keys, plan.layers[0].values
    assert (keys.bits_per_value, values.bits_per_value) == (4.0, 1.0)
    assert measuring.stored_bits(plan) == (4.0 * 64 + 1.0 * 16) / (64 + 16)


def test_nothing_is_timed_that_was_not_done_before(monkeypatch, model, nats):
    done, timed = set(), set()
    forward, peak = measuring.Method.forward, measuring._peak

    def seen(self, model, ids, caches):
        done.add((self.name, ids.shape[1] if ids.shape[1] > 1 else "step"))
        return forward(self, model, ids, caches)

    def watched(run, before):
        earlier = set(done)
        result = peak(run, before)
        timed.update(done - earlier)
        return result

    compared = measuring.methods(model, nats, [2.0])[0]
    monkeypatch.setattr(measuring.Method, "forward", seen)
    monkeypatch.setattr(measuring, "_peak", watched)
    monkeypatch.setattr(measuring, "held", lambda *_: ())
    monkeypatch.setattr(compare, "backend", lambda: "one that compiles")
    compare._bytes_and_speed(model, compared, REQUEST)
    assert timed == set()
    assert {name for name, _ in done} == {measuring.FULL, measuring.MLX, "spectral 2"}
    assert {count for _, count in done} == {compare.READ_TOKENS, measuring.PIECE, "step"}


def test_the_report_subtracts_what_was_measured(report):
    machine = report["machine"]
    assert machine["active_bytes"] > 0
    for row in report["methods"]:
        found, longest = row["largest"], row["held"]["768"]
        grown = longest["nbytes"] - row["held"]["256"]["nbytes"]
        assert found["per_token"] == (grown / 512 if grown else longest["nbytes"] / 768)
        left = machine["memory_bytes"] - machine["active_bytes"] - found["codec"] - found["fixed"] - found["working"]
        assert found["tokens"] == int(left / (found["per_token"] + found["working_per_token"]))
        assert (found["working_per_token"] > 0) >= (row["kind"] == "mlx")
        assert (found["codec"] > 0) == (row["kind"] == "spectral")


def test_bits_and_spectra_are_the_codecs(report, nats):
    for budget in (1.0, 2.0):
        rows = report["widths"][f"{budget:g}"]
        for layer, pair in nats.plan(budget).layers.items():
            for part in ("keys", "values"):
                mine = [r["bits"] for r in rows if (r["layer"], r["part"]) == (layer, part)]
                assert mine == ["".join(map(str, row)) for row in getattr(pair, part).layout.widths.tolist()]
    for row in report["spectra"]:
        heads = nats.layers[row["layer"]][row["part"] == "values"].eigenvalues.astype(np.float64)
        assert row["eigenvalues"] == pytest.approx(heads.mean(axis=0), rel=1e-3)
        assert row["effective_dims"] == pytest.approx((heads.sum(1) ** 2 / (heads**2).sum(1)).mean(), rel=1e-4)
    mass = scored_mass([0, *range(256, 700, 16), 700], 128, 4)
    assert report["far_mass"] == mass
    assert report["predicted_kl"] == {"1": nats.kl_of_mass(1.0, mass), "2": nats.kl_of_mass(2.0, mass)}


@given(st.integers(compare.LEAST_TEXT, 9000), st.integers(compare.LEAST_TEXT, 1024))
def test_texts_are_no_longer_than_asked_and_read_nearly_all(tokens, longest):
    count, length = compare._sequences(tokens, longest)
    assert compare.LEAST_TEXT <= length <= longest
    assert count * length <= tokens
    assert tokens - count * length < max(count, compare.LEAST_TEXT * (longest < 2 * compare.LEAST_TEXT))


WORDS = st.lists(st.sampled_from(["a", "bb", "c\n", "d  e", " "]), max_size=12).map(" ".join)


@given(WORDS, WORDS)
def test_pieces_rebuild_both_texts(reference, other):
    pieces = compare.differences(reference, other)
    assert "".join(words for kind, words in pieces if kind != "missing") == other
    same = [w for kind, words in pieces if kind == "same" for w in words.split()]
    rest = iter(reference.split())
    assert all(word in rest for word in same)  # in this order
    if reference == other:
        assert {kind for kind, _ in pieces} <= {"same"}


def test_differences_are_marked_where_they_are():
    pieces = compare.differences("the cat sat on a mat", "the dog sat on mat")
    assert pieces == [("same", "the"), ("other", " dog"), ("same", " sat on"), ("missing", " a"), ("same", " mat")]


# -- the page


class Page(html.parser.HTMLParser):
    """What a browser would make of the page's text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.shown, self.stack, self.marked = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "path", "rect", "circle", "polygon", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in ("path", "rect", "circle", "polygon"):
            return
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.shown.append(data)
        if "mark" in self.stack or "del" in self.stack:
            self.marked.append(data)


def test_the_page_is_whole_and_loads_nothing(report):
    found = Page(page(report))
    assert found.stack == []
    assert set(SECTIONS) <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert "script" not in found.tags
    for tag, name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            assert value == "data:," or value[1:] in SECTIONS, (tag, value)
    style = page(report).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    names = {(tag, name) for tag, name, _ in found.attributes}
    assert ("svg", "aria-label") in names
    assert found.tags.count("caption") == found.tags.count("table") >= 8
    assert ("meta", "name", "viewport") in found.attributes
    text = "".join(found.shown)
    for row in report["methods"]:
        assert f"{row['held']['768']['nbytes']:,}" in text
        assert f"{row['largest']['tokens']:,}" in text
        assert f"{row['top1']:.2%}" in text
    assert "At one context" not in text


def test_every_mark_is_on_the_page_and_nothing_else_is_marked(report):
    report = copy.deepcopy(report)
    report["methods"][1]["continuation"]["pieces"] = [["same", "one"], ["other", " two"], ["missing", " three"]]
    for m in (report["methods"][0], *report["methods"][2:]):
        m["continuation"]["pieces"] = [["same", "one three"]]
    found = Page(page(report))
    assert "".join(found.marked[2:]) == "[differs:] two[end][missing:] three[end]"  # after the two of the explanation


def said_of(report, name):
    return page(report).split(f"<h3>{name}</h3>")[1].split("</p>")[0]


def test_a_text_that_goes_on_is_not_the_same_text(report):
    # Not in the page, which tells of millions of tokens that find room, and their number may end so.
    assert not any("10 tokens" in said_of(report, m["name"]) for m in report["methods"])
    report = copy.deepcopy(report)
    full, *_, ours = report["methods"]
    for m, tokens in ((full, 10), (ours, 12)):
        m["continuation"] |= {"tokens": tokens, "same_tokens": 10}
    assert said_of(report, ours["name"]).endswith("the same for 10 tokens")
    ours["continuation"]["tokens"] = 10
    assert said_of(report, ours["name"]).endswith("the same text")


def test_a_page_without_differences_or_room_is_still_a_page(report):
    report = copy.deepcopy(report)
    for m in report["methods"]:
        m |= {"kl": 0.0, "kl_999": -1e-9}
    report["methods"][0]["largest"]["tokens"] = 0
    found = Page(page(report))
    assert found.stack == []
    assert "×" not in "".join(found.shown)


HOSTILE = "</script><b onload=alert(1)>\"'&</style></details>"


def poisoned(part):
    if isinstance(part, str):
        return HOSTILE
    return [poisoned(p) for p in part] if isinstance(part, list) else {k: poisoned(v) for k, v in part.items()} \
        if isinstance(part, dict) else part  # fmt: skip


def test_hostile_text_is_text(report):
    evil = copy.deepcopy(report)
    for name in ("model", "text", "prompt", "machine", "codec", "fingerprint", "missing"):
        evil[name] = poisoned(evil[name]) or HOSTILE
    for m in evil["methods"]:
        m["continuation"]["pieces"] = [["other", HOSTILE], ["same", HOSTILE], ["missing", HOSTILE]]
        m["name"] = f"spectral {HOSTILE}"
    found, harmless = Page(page(evil)), Page(page(report))
    assert set(found.tags) <= set(harmless.tags) | {"p", "mark", "del"}
    assert "".join(found.shown).count(HOSTILE) > 20
    assert found.stack == []


def test_the_heat_map_shows_every_run_of_bits(report):
    text = page(report)
    for part in ("keys", "values"):
        label = f"Bits of the {part} at 2 bits: layers and heads downwards, dimensions across."
        image = text.split(f'aria-label="{label}"')[1].split("</svg>")[0]
        drawn = {}
        for width, path in re.findall(r'<path class="w(\d)" d="([^"]*)"', image):
            for x, y, span in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", path):
                drawn.setdefault(float(y), []).append((float(x), float(span), width))
        rows = [r["bits"] for r in report["widths"]["2"] if r["part"] == part]
        assert len(drawn) == len(rows)
        for bits, (_, runs) in zip(rows, sorted(drawn.items()), strict=True):
            unit = sum(span for _, span, _ in runs) / len(bits)
            left = min(runs)[0]
            shown = dict.fromkeys(range(len(bits)))
            for x, span, width in runs:
                shown |= dict.fromkeys(range(round((x - left) / unit), round((x - left + span) / unit)), width)
            assert "".join(shown.values()) == bits


# -- the command


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i}" for i in IDS))
    return file


def test_the_command_writes_the_page_and_the_figures(model_folder, stored_codec, text_file, tmp_path, capsys):
    target = tmp_path / "there" / "page.html"
    arguments = ["--text", str(text_file), "--bits", "2", "--context", "256", "--tokens", "320", "--max-tokens", "3",
                 "--output", str(target), "--json", str(tmp_path / "figures.json"), "--prompt", "w3 w4"]  # fmt: skip
    assert cli.main(["compare", str(model_folder), *arguments]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [m["name"] for m in figures["methods"]] == [measuring.FULL, measuring.MLX, "spectral 2"]
    assert figures["prompt"] == {"text": "w3 w4", "tokens": 2}
    assert str(tmp_path) not in json.dumps(figures)
    assert target.read_text() == page(figures)
    assert [p.name for p in target.parent.iterdir()] == ["page.html"]
    for m in figures["methods"]:
        line = next(line for line in shown.splitlines() if line.startswith(m["name"]))
        assert f"{m['kl']:.5f}" in line
        assert f"{m['held']['256']['nbytes']:,}" in line
    assert str(target) in shown
    assert "At one context the window counts as if it grew, so more fit" in shown
    assert "At one context" in page(figures)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read (No such file or directory); expected a text"),
        (["--text", "SHORT"], "the text has 40 tokens; expected at least 320; give a longer --text."),
        (["--text", "BINARY"], "binary.txt is not UTF-8; expected plain text; convert it first."),
        (["--bits", "1,x"], "--bits is '1,x'; expected numbers separated by commas, as in 1,2.5,4."),
        (["--bits", "9"], "bits_per_value is 9.0; expected a number from 0.25 to 8"),
        (["--context", "64,512"], "--context has 64; expected 256 or more."),
        (["--context", "many"], "--context is 'many'; expected whole numbers separated by commas"),
        (["--tokens", "10"], "--tokens is 10; expected at least 320."),
        (["--max-tokens", "0"], "--max-tokens is 0; expected at least 1."),
        (["--prompt", ""], "the prompt is empty; expected some text."),
        (["--codec", "nowhere.codec"], "nowhere.codec cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(options, sentence, model_folder, text_file, tmp_path, capsys):
    (tmp_path / "short.txt").write_text(" ".join(["w5"] * 40))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    named = {"SHORT": str(tmp_path / "short.txt"), "BINARY": str(tmp_path / "binary.txt")}
    output = tmp_path / "page.html"
    arguments = ["--text", str(text_file), *(named.get(o, o) for o in options), "--output", str(output)]
    assert cli.main(["compare", str(model_folder), *arguments]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("vq_kvcache compare: ")
    assert len(said.splitlines()) == 1
    assert not output.exists()


def request_of(model, tokenizer, *options, prompt=None):
    args = compare._parser().parse_args(["model", *options])
    return compare._request(args, model, tokenizer, "words", " ".join(f"w{i}" for i in IDS * 3), prompt, [2.0])


def test_the_models_own_limit_bounds_what_is_read(tokenizer):
    short = tiny_model(max_position_embeddings=400)
    asked = request_of(short, tokenizer, "--max-tokens", "100", "--tokens", "1500")
    assert (asked.contexts, asked.sequence, len(asked.prompt_ids)) == ([400], 400, 300)
    long = tiny_model(max_position_embeddings=131_072)
    assert request_of(long, tokenizer, "--context", "65536").contexts == [65_536]
    with pytest.raises(ValueError, match=r"--context has 131,073; expected 256 to 131,072, the model's own\."):
        request_of(long, tokenizer, "--context", "131073")
    with pytest.raises(ValueError, match=r"prompt has 5 tokens and --max-tokens is 396; expected at most 400 together"):
        request_of(short, tokenizer, "--max-tokens", "396", prompt="w2 w3 w4 w5 w6")
    assert len(request_of(short, tokenizer, "--max-tokens", "395", prompt="w2 w3 w4 w5 w6").prompt_ids) == 5
    with pytest.raises(ValueError, match=r"the model is made for 300 tokens; expected at least 320\."):
        request_of(tiny_model(max_position_embeddings=300), tokenizer)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    assert cli.main(["compare", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "cannot be loaded (" in said
    assert "expected a model that mlx_lm.load takes." in said


def test_a_model_that_mlx_cannot_quantize_is_compared_without(tokenizer):
    model = tiny_model(head_dim=48)
    found, why = measuring.methods(model, Codec(fingerprint(model), odd_layers(), {"objective": "none"}), [2.0])
    assert [m.name for m in found] == [measuring.FULL, "spectral 2"]
    assert why == "mx.quantize takes groups of 32 or 64; heads have [48] numbers"


def odd_layers():
    return random_codec(layers=2, key_dims=48).layers


def test_texts_begin_as_the_tokenizer_begins_them():
    inner = tiny_tokenizer()
    assert compare._opening(TokenizerWrapper(inner)) == []
    inner.bos_token = "w9"
    assert compare._opening(TokenizerWrapper(inner)) == []
    template = tokenizers.processors.TemplateProcessing(single="w9 $A", special_tokens=[("w9", 9)])
    inner.backend_tokenizer.post_processor = template
    assert compare._opening(TokenizerWrapper(inner)) == [9]


def test_a_prompt_goes_through_the_chat_template():
    inner = tiny_tokenizer()
    inner.chat_template = "w7 {{ messages[0]['content'] }} w8"
    assert compare._prompt_ids(TokenizerWrapper(inner), "w3 w4") == [7, 3, 4, 8]
