"""compare and calibrate on odd input: what would be found out after minutes is found out at once."""

import warnings

import mlx.core as mx
import pytest
from conftest import VOCABULARY, random_codec, random_prompt, tiny_tokenizer
from huggingface_hub import errors
from mlx_lm.models import mamba
from mlx_lm.tokenizer_utils import TokenizerWrapper

from vq_kvcache import calibration, cli, compare, demo, inspection
from vq_kvcache.fitting import Fit
from vq_kvcache.options import CacheOptions
from vq_kvcache.spectral import calibrate


@pytest.fixture
def never(monkeypatch):
    """Nothing is loaded."""
    for module, name in ((compare, "loaded"), (calibration, "loaded")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("command", [["compare"], ["compare", "--json"], ["calibrate"]])
@pytest.mark.parametrize("target", ["a folder", "a file/page.html"])
def test_where_nothing_can_be_written_is_said_before_the_work(command, target, never, tmp_path, capsys):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").write_text("")
    option = command[1:] or ["--output"]
    if command == ["compare", "--json"]:
        option = ["--output", str(tmp_path / "page.html"), "--json"]
    assert cli.main([command[0], "some/model", *option, str(tmp_path / target)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"{tmp_path / target} cannot be written (" in said[0]
    assert said[0].endswith("); expected a file in a folder that can.")


@pytest.fixture(scope="module")
def recurrent():
    """A model that has no KV cache at all."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "state_size": 8}
    others = {"num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    model = mamba.Model(mamba.ModelArgs("mamba", **sizes, **others))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("codec", [False, True])
def test_a_model_with_nothing_to_pack_is_one_sentence(codec, recurrent, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "loaded", lambda _: (recurrent, TokenizerWrapper(tiny_tokenizer())))
    monkeypatch.setattr(calibrate, "calibration_sequences", lambda *_, **__: pytest.fail("calibration began"))
    text, file = tmp_path / "text.txt", tmp_path / "other.codec"
    text.write_text(" ".join(f"w{i}" for i in random_prompt(400)))
    random_codec().save(file)
    arguments = ["--text", str(text), "--context", "256", "--output", str(tmp_path / "page.html")]
    assert cli.main(["compare", "some/model", *arguments, *(["--codec", str(file)] if codec else [])]) == 1
    assert capsys.readouterr().err == (
        "vq_kvcache compare: no layer of this model has a KV cache to pack; expected full-attention layers; use "
        "mlx-lm's own cache (--kv-cache full) with it.\n"
    )


def test_budgets_that_are_named_alike_are_measured_once():
    assert compare._numbers("bits", "2,2.00000001,1", float) == [1.0, 2.0]
    assert compare._numbers("context", "512,256,512", int) == [256, 512]


def test_an_interrupted_command_ends_in_a_line(monkeypatch, capsys):
    def main(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "main", main)
    assert cli.main(["compare", "some/model"]) == 130
    assert capsys.readouterr().err == "\nvq_kvcache compare: interrupted\n"


@pytest.mark.parametrize("command", ["compare", "calibrate", "inspect"])
def test_a_model_that_is_nowhere_is_one_line(command, monkeypatch, tmp_path, capsys):
    def load(*_, **__):
        raise errors.LocalEntryNotFoundError("cannot be reached\nAn error happened, please")

    monkeypatch.setattr(inspection, "load", load)
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "some/model"]) == 1
    reason = "cannot be reached); expected a model that mlx_lm.load takes."
    assert capsys.readouterr().err == f"vq_kvcache {command}: some/model cannot be loaded ({reason}\n"


def test_a_context_alone_is_refused_by_inspect(capsys):
    assert cli.main(["inspect", "some/model", "--kv-context", "100"]) == 1
    assert "--kv-context was given alone; expected --kv-memory or --kv-max-kl with it." in capsys.readouterr().err


def test_a_budget_beside_what_chooses_one_is_refused():
    for chooses in ({"memory": "2GB"}, {"max_kl": 0.01}):
        with pytest.raises(ValueError, match=r"bits_per_value=3\.0 was given with memory or max_kl, which choose it"):
            CacheOptions(3.0, **chooses)
        assert CacheOptions(**chooses).bits_per_value == 2.0


def test_a_fit_of_no_limit_speaks_of_no_longest_sequence():
    assert str(Fit(2.0, 4096, 2_000_000, 0.001)).startswith("2.0 bits: 4,096 tokens in 2.0 MB; ")
    assert str(Fit(2.0, 1, 1_000_000, 0.001)).startswith("2.0 bits: a token takes 1.0 MB; ")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--bits", "9"],
            "bits_per_value is 9.0; expected a number from 0.25 to 8, or one for keys and one for values.",
        ),
        (["--tokens", "0"], "--tokens is 0; expected at least 1."),
        (["--plot", "."], ". cannot be written (Is a directory); expected a file in a folder that can."),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(options, sentence, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("a model was loaded"))
    assert cli.main(["demo", *options]) == 1
    assert capsys.readouterr().err == f"vq_kvcache demo: {sentence}\n"


@pytest.mark.parametrize(("samples", "length"), [(0, 1024), (2, 0)])
def test_numbers_of_samples_that_are_none_are_not_blamed_on_the_model(samples, length, model, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=f"{samples} samples of {length} tokens; expected at least 1 of at least 2"
        ):
            calibrate.calibrate_codec(model, tokenizer, samples, length)
