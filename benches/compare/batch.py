"""Measures `cadre batch`, and clients of `cadre serve` and of llama-server, in turn on the same lines: see README.md."""

import json
import re
import statistics
import subprocess
import sys

import http_load
from checkpoints import FORMATS
from compare import Cadre, LlamaCpp, options_of, prepare


def batch(options, model, vocabulary):
    """Generated tokens per second of `cadre batch`, loading left out, as the servers' is."""
    requests, results = (options.work / f"lines.{name}.jsonl" for name in ("requests", "results"))
    with requests.open("w") as lines:
        for number, body in enumerate(http_load.bodies(options.lines, vocabulary)):
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            lines.write(json.dumps(line) + "\n")
    for old in options.work.glob(f"{results.name}*"):
        old.unlink()
    command = [options.cadre, "batch", "-i", requests, "-o", results, "--model", model, "--threads", options.threads]
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    summary = re.search(r"(\d+) lines in ([\d.]+) s, 0 of them failed", run.stderr)
    if run.returncode or not summary or int(summary[1]) != options.lines:
        raise SystemExit(f"cadre batch failed with status {run.returncode}:\n{run.stderr[-2000:]}")
    return options.lines * http_load.ANSWER_TOKENS / float(summary[2])


def clients(engine, options, model, vocabulary):
    """Generated tokens per second of a server whose clients share the lines."""
    command, env = engine.server(model, http_load.free_port(), options.clients)
    requests = http_load.bodies(options.lines, vocabulary)
    return http_load.measure(command, env, options.clients, requests, vocabulary)


def parse():
    parser = options_of(__doc__, rounds=3)
    parser.add_argument("--format", choices=FORMATS, default="q8_0")
    parser.add_argument("--lines", type=int, default=512)
    parser.add_argument("--clients", type=int, default=32)
    return parser.parse_args()


def main():
    options = parse()
    folder, checkpoints = prepare(options)
    ours, theirs = checkpoints.for_cadre(options.format), checkpoints.for_llama_cpp(options.format)
    vocabulary = checkpoints.vocabulary()
    sides = {
        "cadre batch": lambda: batch(options, ours, vocabulary),
        "cadre serve": lambda: clients(Cadre(options), options, ours, vocabulary),
        "llama-server": lambda: clients(LlamaCpp(options, folder), options, theirs, vocabulary),
    }
    speeds = {name: [] for name in sides}
    for number in range(options.rounds):
        for name, measure in sides.items():
            speeds[name].append(measure())
            print(f"round {number + 1} of {options.rounds}: {name} {speeds[name][-1]:.1f}", file=sys.stderr)
    first = statistics.median(speeds["cadre batch"])
    print(
        f"Preset {options.size} at {options.format}, {options.threads} threads, {options.lines} lines of"
        f" {http_load.PROMPT_TOKENS} tokens in and {http_load.ANSWER_TOKENS} out, {options.clients} clients,"
        f" medians of {options.rounds} rounds\n\n| | generated tokens/s | cadre batch is |\n|---|---|---|"
    )
    for name, figures in speeds.items():
        median = statistics.median(figures)
        print(f"| {name} | {median:.1f} | {first / median:.2f}× |")


if __name__ == "__main__":
    main()
