"""mlx_lm's server with the cache on, in a process of its own, and a client that streams from it.

python examples/serve.py MODEL PROMPT
The client needs the package `openai`; any other client of an OpenAI-like server does as well.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai


def start(model: str, port: int) -> subprocess.Popen[bytes]:
    """`vq_kvcache server`, once it answers."""
    options = ["--model", model, "--port", str(port), "--kv-memory", "2GB", "--log-level", "WARNING"]
    server = subprocess.Popen([sys.executable, "-m", "vq_kvcache", "server", *options])
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the server ended with status {server.returncode}.")


def main(model: str, prompt: str) -> None:
    """Start the server, print what it streams, stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(model, port)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for chunk in client.completions.create(model="default_model", prompt=prompt, max_tokens=40, stream=True):
            print(chunk.choices[0].text, end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
