"""mlx_lm.server in this process, on a free port of the loopback device, with the hook on or off."""

import contextlib
import json
import shutil
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from unittest import mock

import mlx.core as mx
import openai
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache

import vq_kvcache

# For tests alone: words of the small tokenizer stand for the roles; mlx-lm takes it for one of JSON tool calls.
CHAT_TEMPLATE = """
{%- if tools %}w94 {% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif -%}
{%- for message in messages %}
{{- {'user': 'w3', 'tool': 'w4'}.get(message.role, 'w5') }} {{ message.content or '' }}{{ ' ' }}
{%- for tool_call in message.tool_calls or [] %}<tool_call> {{ tool_call.name }} </tool_call> {% endfor %}
{%- endfor %}
{%- if add_generation_prompt %} w6{% endif %}
"""
CALL = '{"name":"w7","arguments":{"place":"w8"}}'
WORDS = {"w90": "<tool_call>", "w91": CALL, "w92": "</tool_call>"}
ANSWER = 6  # the template's last word, after which the scripted model calls a tool


def served_folder(source, target):
    """A copy of a tests' model folder whose tokenizer has a chat template and knows the words of a tool call."""
    shutil.copytree(source, target)
    words = (target / "tokenizer.json").read_text("utf-8")
    for word, other in WORDS.items():
        words = words.replace(json.dumps(word), json.dumps(other))
    words = json.dumps({**json.loads(words), "pre_tokenizer": {"type": "WhitespaceSplit"}})  # keeps these in one piece
    (target / "tokenizer.json").write_text(words, "utf-8")
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "chat_template": CHAT_TEMPLATE}))
    return target


@contextlib.contextmanager
def scripted_calls(kind):
    """Make models of this class go on after the word ANSWER with a tool call, and end there."""
    follows, original = {ANSWER: 90, 90: 91, 91: 92, 92: 1}, kind.__call__

    def scripted(self, inputs, *args, **kwargs):
        logits = original(self, inputs, *args, **kwargs)
        for word, following in follows.items():
            wanted = mx.arange(logits.shape[-1]) == following
            logits = mx.where((inputs == word)[..., None] & wanted, 1e4, logits)
        return logits

    with mock.patch.object(kind, "__call__", scripted):
        yield


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait; the standard library's 5 are refused under many clients


class LocalServer:
    """A running server. As a context it stops at the end; `hook` is what `vq_kvcache.install` takes, or None."""

    def __init__(self, folder, hook=None, *arguments):
        self.folder, self.hook = str(folder), hook
        self.arguments = ["server", "--model", self.folder, "--log-level", "ERROR", *map(str, arguments)]

    def __enter__(self):
        seen = []
        with (
            mock.patch.object(sys, "argv", self.arguments),
            mock.patch.object(server, "run", lambda *a: seen.append(a)),
        ):
            server.main()
        self.provider = seen[0][2]
        with contextlib.ExitStack() as installed:
            if self.hook is not None:
                installed.enter_context(vq_kvcache.install(self.hook))
            self.prompt_cache = LRUPromptCache(self.provider.cli_args.prompt_cache_size)
            self.generator = server.ResponseGenerator(self.provider, self.prompt_cache)
            self._wait(lambda: self.provider.model is not None and self.provider.model_key is not None)
            self._installed = installed.pop_all()

        def handler(*args, **kwargs):
            return server.APIHandler(self.generator, *args, system_fingerprint="test", **kwargs)

        self._http = _Listener(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self.generator.stop_and_join()
        self._installed.close()

    def _wait(self, ready, seconds=60):
        until = time.monotonic() + seconds
        while not ready():
            assert self.generator._generation_thread.is_alive(), "the server's thread died while it loaded"
            assert time.monotonic() < until, "the server did not load the model in time"
            time.sleep(0.01)

    @property
    def alive(self):
        """Whether the thread that generates is."""
        return self.generator._generation_thread.is_alive()

    def client(self, timeout=120):
        """The real client, bound to this server."""
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=timeout)

    def complete(self, prompt, **options):
        """The text that follows a prompt, streamed."""
        chunks = self.client().completions.create(
            model="default_model", prompt=prompt, stream=True, temperature=0, **options
        )
        return "".join(c.choices[0].text for c in chunks if c.choices)

    def answer(self, messages, **options):
        """The message that answers others, in one piece."""
        done = self.client().chat.completions.create(model="default_model", messages=messages, temperature=0, **options)
        return done.choices[0]


def words_of(ids):
    """A prompt for the small tokenizer."""
    return " ".join(f"w{i}" for i in ids)
