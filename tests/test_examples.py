"""The examples run on the shipped model, as their first lines say, and say what they should."""

import pathlib
import re
import subprocess
import sys

import pytest

from vq_kvcache import demo

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
MODEL = str(demo.model_folder())
PROMPT = "It was a dark night, and"


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text((demo.model_folder().parent / "demo.txt").read_text("utf-8")[:4000], "utf-8")
    return file


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / f"{name}.py", MODEL, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def held(line):
    """Tokens and bytes that an example says it holds."""
    return tuple(int(n.replace(",", "")) for n in re.match(r"([\d,]+) tokens in ([\d,]+) bytes", line).groups())


def test_every_example_is_run_here():
    text = pathlib.Path(__file__).read_text("utf-8")
    assert sorted(EXAMPLES.glob("*.py"))
    assert all(f'run("{file.stem}"' in text for file in EXAMPLES.glob("*.py"))


def test_long_document(book):
    questions = "Who is Dorothy?", "Who is Toto?"
    first, *answers = run("long_document", book, *questions, "--max-tokens", 8, "--memory", "2.5MB").split("\n\n")
    tokens, nbytes = held(first)
    assert 900 < tokens < 1100
    assert nbytes < 0.4 * tokens * 6 * 2 * 2 * 64 * 2
    assert [a.split("\n")[0] for a in answers if a.split("\n")[0] in questions] == list(questions)
    (alone,) = run("long_document", book, questions[1], "--max-tokens", 8, "--memory", "2.5MB").split("\n\n")[1:][:1]
    assert alone.strip() == answers[-1].strip()  # the first question left nothing behind


def test_saved_prompt(book, tmp_path):
    file = tmp_path / "book.safetensors"
    tokens, nbytes = held(run("saved_prompt", "save", book, file))
    assert 900 < tokens < 1100
    assert nbytes < file.stat().st_size < nbytes + 20_000
    assert len(run("saved_prompt", "ask", file, "\n\nDorothy said").split()) > 20


def test_batch_and_serve_go_on_alike():
    """Greedy both, by the same model: a row beside another, and a stream of the server by itself."""
    first, second = run("batch", PROMPT, "The king").split(f"{PROMPT}|")[1].split("\nThe king|")
    assert len(first.split()) > 10 < len(second.split())
    served = run("serve", PROMPT)
    assert len(served.split()) > 10
    assert first.strip().startswith(served.strip()[:40])
