"""Load on a server that speaks OpenAI's completions."""

import http.client
import json
import queue
import random
import socket
import subprocess
import threading
import time

PROMPT_TOKENS = 128
ANSWER_TOKENS = 64
START_SECONDS = 300


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def bodies(count, vocabulary, seed=1):
    """Requests of random token ids, so that all engines see the same and no prefix is known."""
    numbers = random.Random(seed)
    for _ in range(count):
        prompt = [numbers.randrange(vocabulary) for _ in range(PROMPT_TOKENS)]
        yield {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}


def measure(command, env, clients, requests, vocabulary):
    """Starts the server and returns the generated tokens per second of all clients, who share the requests."""
    port = int(command[command.index("--port") + 1])
    process = subprocess.Popen(
        [str(word) for word in command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_until_ready(process, port)
        for body in bodies(1, vocabulary, seed=0):
            _ask(port, body)  # warm
        return _load(port, clients, requests)
    finally:
        process.terminate()
        process.wait()


def _load(port, clients, requests):
    waiting, counts, errors = queue.SimpleQueue(), [], []
    for body in requests:
        waiting.put(body)

    def client():
        try:
            while not errors:
                counts.append(_ask(port, waiting.get_nowait()))
        except queue.Empty:
            pass
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    if errors:
        raise SystemExit(f"a request failed: {errors[0]}")
    return sum(counts) / seconds


def _ask(port, body):
    """The number of tokens that the answer has."""
    status, answer = _request(port, "POST", "/v1/completions", body)
    if status != 200:
        raise RuntimeError(f"status {status}: {answer[:500]}")
    return json.loads(answer)["usage"]["completion_tokens"]


def _request(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    try:
        connection.request(method, path, body and json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _wait_until_ready(process, port):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{process.args[0]} ended with status {process.returncode}")
        try:
            if _request(port, "GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{process.args[0]} was not ready after {START_SECONDS} s")
