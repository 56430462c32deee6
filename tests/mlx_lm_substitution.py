"""A pytest plugin for mlx-lm's own tests: gives them lossless spectral caches for KVCache and BatchKVCache, a small
model for the one they download, and writes what came of every test. `run_mlx_lm_tests.py` loads it.

Environment: VQ_SUBSTITUTE (1: our classes, 0: mlx-lm's own), VQ_MODEL (the model's folder), VQ_RESULTS (a file).
"""

import functools
import json
import os
import pathlib
import sys
import types

import mlx.core as mx
import mlx_lm.utils
from mlx_lm.models import cache as mlx_lm_cache

SUBSTITUTE = os.environ["VQ_SUBSTITUTE"] == "1"
WINDOW, SINKS, BLOCK, LAG = 6, 2, 4, 1  # so small that the short prompts of these tests are packed
results: dict[str, str] = {}


def _local_model(*_args, **_kwargs):
    return pathlib.Path(os.environ["VQ_MODEL"])


def _stub_lm_eval():
    """Enough of lm_eval for mlx_lm.evaluate to be imported: its tests ask the model, and never lm_eval."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["lm_eval.api.model"].LM = object
    sys.modules["lm_eval.api.registry"].register_model = lambda _name: lambda kind: kind


def _substitute():
    from vq_kvcache import batch_cache, batch_storage, cache, storage
    from vq_kvcache.spectral import intercept, sealing

    for module in (sealing, storage, cache, batch_storage, batch_cache):
        module.BLOCK, module.LAG = BLOCK, LAG
    for kind, name in ((cache.SpectralKVCache, "KVCache"), (batch_cache.BatchSpectralKVCache, "BatchKVCache")):
        options = {"plan": cache.LOSSLESS, "window": WINDOW, "sinks": SINKS}
        kind.__init__ = functools.partialmethod(kind.__init__, **options)
        setattr(mlx_lm_cache, name, kind)
        setattr(mlx_lm_cache, kind.__name__, kind)
    intercept.enable()


def pytest_configure(config):
    mx.set_default_device(mx.cpu)
    # 0.31 has no `_download` that takes a name alone, but both have this function, and look it up when called.
    mlx_lm.utils._download = _local_model
    _stub_lm_eval()
    if SUBSTITUTE:
        _substitute()


def pytest_runtest_logreport(report):
    name = report.nodeid.removeprefix("tests/")
    if context := getattr(report, "context", None):
        name += f" [{context.msg or ''} {' '.join(f'{k}={v}' for k, v in context.kwargs.items())}]"
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        results[name] = "failed: " + (crash.message if crash else str(report.longrepr)).split("\n")[0][:200]
    elif report.skipped:
        results.setdefault(name, "skipped")
    elif report.when == "call":
        results.setdefault(name, "passed")


def pytest_sessionfinish(session):
    pathlib.Path(os.environ["VQ_RESULTS"]).write_text(json.dumps(results, indent=1))
