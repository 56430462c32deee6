"""compare and calibrate on odd input: what would be found out after minutes is found out at once."""

import mlx.core as mx
import pytest
from conftest import VOCABULARY, random_codec, random_prompt, tiny_tokenizer
from mlx_lm.models import mamba
from mlx_lm.tokenizer_utils import TokenizerWrapper

from vq_kvcache import calibration, cli, compare
from vq_kvcache.spectral import calibrate


@pytest.fixture
def never(monkeypatch):
    """Nothing is loaded."""
    for module, name in ((compare, "_load"), (calibration, "load")):
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
    monkeypatch.setattr(compare, "_load", lambda _: (recurrent, TokenizerWrapper(tiny_tokenizer())))
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
