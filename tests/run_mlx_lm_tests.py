"""mlx-lm's own tests, from its source distributions, with lossless spectral caches in place of its KVCache and
BatchKVCache: `python tests/run_mlx_lm_tests.py [--versions 0.32.2 0.31.3] [--out FILE]`.

Fetches the distribution with pip (or takes it from --sources), runs each version's tests twice, with mlx-lm's own
classes and with ours, and writes a table of what failed and why. Exit status 1 if a test fails with ours, passes with
mlx-lm's, and is not among EXCEPTIONS, or if one of MUST_PASS does not pass. Takes some minutes.
"""

import argparse
import collections
import concurrent.futures
import fnmatch
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
FILES = ["test_prompt_cache.py", "test_generate.py", "test_server.py", "test_models.py", "test_evaluate.py",
         "test_chat.py", "model_parallel_tests.py"]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Tests that ask for what a spectral cache is not, by the words they fail with.
EXCEPTIONS = {
    "test_prompt_cache.py::*::test_save_load": "reads keys and values from the saved state by position",
    "test_prompt_cache.py::*::test_save_load_batch_caches": "gives keys of four rows to a batch of two; ours refuses",
    "test_prompt_cache.py::*::test_merge_with_empty_caches": "wants `keys` to be all keys and nothing else",
    "test_prompt_cache.py::*::test_cache_copying": "reads keys from the cache's own buffer by position",
    "test_prompt_cache.py::*::test_cache_to_quantized": "calls to_quantized, which ours hides",
    "test_models.py::*::test_quantized_sdpa*": "calls to_quantized, which ours hides",
    "test_server.py::*::test_completion_quantizes_the_cache": "asks for mlx-lm's --kv-bits, which ours replaces",
}
# mlx-lm before 0.32 has no keys_and_values: two of its models, and these tests, read keys and values from `state`.
READS_STATE = "reads keys and values from `state`, as mlx-lm before 0.32 has it"
EXCEPTIONS_OF = {
    "0.31.3": {
        "test_prompt_cache.py::*::test_batch_kv_cache": READS_STATE,
        "test_server.py::TestLRUPromptCache::test_caching": READS_STATE,
        "test_models.py::*::test_all_models [[]Testing afm7 *": READS_STATE,
        "test_models.py::*::test_all_models [[]Testing gemma3n *": READS_STATE,
    }
}
MUST_PASS = {
    "test_generate.py": [
        "test_batch_matches_single", "test_many_batches", "test_batch_continued_generation*",
        "test_batch_unique_max_toks", "test_stream_generate_speculative", "*worker_thread",
        "test_extend_cache_with_empty*", "test_remove_prompt_batch_*",
    ],
    "test_prompt_cache.py": [
        "test_save_load*", "test_trim*", "test_cache_copying", "test_make_mask*", "test_batch_kv_cache*",
        "test_window_mask_with_full_kv_cache",
    ],
    "test_server.py": ["TestServer*", "TestLRUPromptCache*", "*draft_model*"],
    "model_parallel_tests.py": ["test_pipeline", "test_shard", "test_pipeline_uneven_model"],
    "test_models.py": ["test_*"],
}  # fmt: skip


def fetch(version, sources, folder):
    """The unpacked source distribution of one version."""
    name = f"mlx_lm-{version}"
    archive = next(iter((sources or folder).glob(f"{name}.tar.gz")), None)
    if archive is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "mlx-lm"]
        subprocess.run([*command, "-d", str(folder), f"mlx-lm=={version}"], check=True)
        archive = folder / f"{name}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / name


def stand_in_model(folder):
    """The demonstration model with a chat template, for the model that the tests would download."""
    target = folder / "model"
    shutil.copytree(HERE.parent / "vq_kvcache" / "data" / "tiny-llama", target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "chat_template": TEMPLATE}))
    return target


def run(source, model, substitute, timeout):
    """{test: "passed", "skipped" or "failed: why"} of one version."""
    results = model.parent / f"results-{source.name}-{int(substitute)}.json"
    results.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(source), str(HERE.parent), str(HERE)]),
        "VQ_SUBSTITUTE": str(int(substitute)), "VQ_MODEL": str(model), "VQ_RESULTS": str(results),
    }  # fmt: skip
    files = [name for name in FILES if (source / "tests" / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mlx_lm_substitution", "-p", "no:cacheprovider", *files]
    log = model.parent / f"log-{source.name}-{int(substitute)}.txt"
    with log.open("w") as out:
        subprocess.run(
            command, check=False, cwd=source / "tests", env=environment, stdout=out, stderr=out, timeout=timeout
        )
    held = json.loads(results.read_text()) if results.exists() else {}
    if missing := [name for name in files if not any(test.startswith(name) for test in held)]:
        raise SystemExit(f"{source.name} gave no results of {missing}; expected some:\n{log.read_text()[-3000:]}")
    return held


def matches(test, patterns):
    """Whether the test, as file::class::name, is named by one of the patterns."""
    return any(fnmatch.fnmatch(part, pattern) for pattern in patterns for part in (test, *test.split("::")[1:]))


def judge(version, own, ours):
    """What differs between the two runs of one version, and whether that is as it should be."""
    reasons = {**EXCEPTIONS, **EXCEPTIONS_OF.get(version, {})}
    failed = {test: why for test, why in ours.items() if why.startswith("failed")}
    named = {t: next((why for p, why in reasons.items() if matches(t, [p])), None) for t in failed}
    new = {t: why for t, why in failed.items() if not own.get(t, "").startswith("failed")}
    must = {}
    for file, patterns in MUST_PASS.items():
        tests = [t for t in ours if t.startswith(file) and matches(t.split(" [")[0], patterns)]
        kept_out = [t for t in tests if t in new and named[t]]
        bad = [t for t in tests if t in new and not named[t]]
        must[file] = {"passed": sum(ours[t] == "passed" for t in tests), "exceptions": kept_out, "failed": bad}
    return {
        "mlx_lm": dict(collections.Counter(why.split(":")[0] for why in own.values())),
        "ours": dict(collections.Counter(why.split(":")[0] for why in ours.values())),
        "fail_with_both": {t: why for t, why in failed.items() if t not in new},
        "exceptions": {t: named[t] for t in new if named[t]},
        "unexpected": {t: why for t, why in new.items() if not named[t]},
        "must_pass": must,
        "missing": sorted(set(own) - set(ours)),
    }


def main():
    """Run the versions asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=["0.32.2", "0.31.3"])
    parser.add_argument("--sources", type=pathlib.Path, help="folder with the source distributions (default: download)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE.parent / "benchmarks" / "results" / "mlx-lm-tests.json"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run")
    arguments = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = stand_in_model(folder)
        sources = [fetch(version, arguments.sources, folder) for version in arguments.versions]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # each fills one core
            runs = [[pool.submit(run, s, model, ours, arguments.timeout) for ours in (False, True)] for s in sources]
        for version, (own, ours) in zip(arguments.versions, runs, strict=True):
            report[version] = judge(version, own.result(), ours.result())
            print(version, json.dumps(report[version], indent=1), flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    bad = any(r["unexpected"] or r["missing"] or any(m["failed"] for m in r["must_pass"].values())
              for r in report.values())  # fmt: skip
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
