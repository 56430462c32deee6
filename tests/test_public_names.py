"""What a newcomer asks the interpreter: names, docstrings in help(), and how long an import takes."""

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import vq_kvcache
import vq_kvcache.spectral

PUBLIC = {name: getattr(home, name) for home in (vq_kvcache, vq_kvcache.spectral) for name in home.__all__}
STACK = ("mlx", "mlx_lm", "transformers", "numpy", "tqdm", "safetensors")


def functions(item):
    """(function, the docstring that has to name its arguments) of a function, or of a class and its public methods."""
    if not inspect.isclass(item):
        return [(item, item.__doc__)]
    members = [getattr(item, name) for name in vars(item) if not name.startswith("_")]
    methods = [(f, f.__doc__) for f in members if inspect.isfunction(f) or inspect.ismethod(f)]
    return [(item, f"{item.__doc__} {item.__init__.__doc__}"), *methods]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_that_names_its_arguments(name):
    item = PUBLIC[name]
    for function, text in functions(item):
        assert text, function
        parameters = inspect.signature(function).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        # A method of one thing, "append keys [B, H, L, Dk]", is clear by its sentence; a choice has to be explained.
        chosen = [p.name for p in named if function is item or p.default is not p.empty]
        assert [name for name in chosen if not re.search(rf"\b{name}\b", text)] == [], function


def test_help_shows_every_public_name():
    text = pydoc.plain(pydoc.render_doc(vq_kvcache))
    assert all(re.search(rf"\b{name}\b", text) for name in vq_kvcache.__all__)
    assert "bits_per_value: stored bits per cached number" in text
    assert set(vq_kvcache.__all__) <= set(dir(vq_kvcache))
    with pytest.raises(AttributeError, match="module 'vq_kvcache' has no attribute 'compress'"):
        vq_kvcache.compress  # noqa: B018


def imported(line):
    """Which packages of the model stack a fresh interpreter has after `line`."""
    code = (
        f"{line}\nimport sys; print(); print(*sorted({{name.split('.')[0] for name in sys.modules}} & {set(STACK)!r}))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return told.splitlines()[-1].split()


@pytest.mark.parametrize(
    "line", ["import vq_kvcache", "from vq_kvcache import __version__, cli; cli.main(['--version'])"]
)
def test_the_model_stack_is_imported_when_it_is_needed(line):
    assert imported(line) == []


def test_public_names_import_what_they_need():
    assert set(imported("from vq_kvcache import SpectralKVCache, generate")) == set(STACK)
