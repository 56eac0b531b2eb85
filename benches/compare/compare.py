"""Measures cadre and llama.cpp in turn on the same random checkpoint at the same bits: see README.md."""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import http_load
import llama_cpp
from checkpoints import FORMATS, SIZES, Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
DECODE_PROMPT = 16  # as in `cadre bench`


def numbers(text):
    return [int(number) for number in text.split(",")]


def json_lines(command, env=None):
    """Runs a program that prints JSON objects, one a line, perhaps between other lines."""
    result = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{command[0]} failed with status {result.returncode}:\n{result.stderr[-2000:]}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def seconds_to_first_byte(command, env=None):
    """From the start of the process to its first output."""
    start = time.monotonic()
    words = [str(word) for word in command]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    first = process.stdout.read(1)
    seconds = time.monotonic() - start
    process.communicate()
    if process.returncode or not first:
        raise SystemExit(f"{command[0]} gave no output, status {process.returncode}")
    return seconds


class Cadre:
    name = "cadre"

    def __init__(self, options):
        self.binary, self.options = options.cadre, options

    def throughput(self, model):
        """(measure, tokens per second) of prompts and batches."""
        options = self.options
        command = [self.binary, "bench", "--model", model, "--threads", options.threads, "--json", "--repetitions", 1]
        command += ["--prompt", options.prompt, "--generate", options.generate, "--batch", options.batch]
        for line in json_lines(command):
            prefill = line["kind"] == "prefill"
            yield f"prefill {line['tokens']}" if prefill else f"batch {line['batch']}", line["tokens_per_second"]

    def start_seconds(self, model):
        command = [self.binary, "generate", "--raw", "--prompt", "hello", "--max-tokens", 1, "--model", model]
        return seconds_to_first_byte([*command, "--threads", self.options.threads])

    def server(self, model, port, clients):
        command = [self.binary, "serve", "--model", model, "--port", port, "--threads", self.options.threads]
        return [*command, "--max-num-seqs", clients], None


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, options, folder):
        self.folder, self.options = folder, options
        self.env = llama_cpp.environment(folder)

    def throughput(self, model):
        options = self.options
        command = [self.folder / "llama-bench", "-m", model, "-t", options.threads, "-r", 1, "-o", "jsonl"]
        for line in json_lines([*command, "-n", 0, "-p", options.prompt], self.env):
            yield f"prefill {line['n_prompt']}", line["avg_ts"]
        context = max(numbers(options.batch)) * (DECODE_PROMPT + options.generate)
        command = [self.folder / "llama-batched-bench", "-m", model, "-c", max(context, 512), "-b", 2048]
        command += ["-t", options.threads, "-tb", options.threads, "--output-format", "jsonl"]
        command += ["-npp", DECODE_PROMPT, "-ntg", options.generate, "-npl", options.batch]
        for line in json_lines(command, self.env):
            yield f"batch {line['pl']}", line["speed_tg"]

    def start_seconds(self, model):
        command = [self.folder / "llama-bench", "-m", model, "-t", self.options.threads, "-r", 1, "-o", "jsonl"]
        return seconds_to_first_byte([*command, "-p", 1, "-n", 0, "--no-warmup"], self.env)

    def server(self, model, port, clients):
        program = self.folder / "llama-server"
        if not program.exists():
            return None, None
        tokens = clients * (http_load.PROMPT_TOKENS + http_load.ANSWER_TOKENS + 16)
        command = [program, "-m", model, "--port", port, "-t", self.options.threads, "-np", clients, "-c", tokens]
        return command, self.env


def measure(engine, model, vocabulary, options):
    """One round of one engine: measure -> figure."""
    figures = dict(engine.throughput(model))
    figures["start (s)"] = engine.start_seconds(model)
    if options.http:
        command, env = engine.server(model, http_load.free_port(), options.clients)
        if command:
            requests = http_load.bodies(2 * options.clients, vocabulary)
            figures[f"HTTP, {options.clients} clients"] = http_load.measure(
                command, env, options.clients, requests, vocabulary
            )
    return figures


def table(results, engines):
    """Medians and their ratio; more than 1 is better for cadre."""
    ours, theirs = (engine.name for engine in engines)
    lines = [f"| format | measure | {ours} | {theirs} | ratio |", "|---|---|---|---|---|"]
    for format, figures in results.items():
        for measured in figures[ours]:
            own, other = (figures[name].get(measured, []) for name in (ours, theirs))
            cells = [f"{statistics.median(values):.2f}" if values else "" for values in (own, other)]
            ratio = ""
            if own and other:
                ratio = statistics.median(own) / statistics.median(other)
                ratio = f"{1 / ratio if measured.startswith('start') else ratio:.2f}"
            lines.append(f"| {format} | {measured} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def options_of(description, rounds):
    """A parser of the options that all comparisons have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", required=True, type=pathlib.Path, help="folder for checkpoints and builds")
    parser.add_argument("--size", choices=SIZES, default="a")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cadre", type=pathlib.Path, default=ROOT / "target/release/cadre")
    parser.add_argument("--llama", type=pathlib.Path, metavar="DIR", help="llama.cpp's programs; built if not given")
    return parser


def prepare(options):
    """The folder of llama.cpp's programs, and the checkpoints."""
    if not options.cadre.exists():
        raise SystemExit(f"{options.cadre} is missing: cargo build --release")
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.llama.resolve() if options.llama else llama_cpp.build(options.work)
    return folder, Checkpoints(options.work, options.size, ROOT, options.cadre, folder)


def parse():
    parser = options_of(__doc__, rounds=5)
    parser.add_argument("--formats", default="bf16,q8_0,q4_k", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--prompt", default="128,512,2048", help="prompt lengths")
    parser.add_argument("--generate", type=int, default=64, help="tokens that each sequence decodes")
    parser.add_argument("--batch", default="1,8,32", help="numbers of sequences")
    parser.add_argument("--http", action="store_true", help="also through the servers")
    parser.add_argument("--clients", type=int, default=16, help="with --http")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="for all figures of all rounds")
    options = parser.parse_args()
    options.formats = options.formats.split(",")
    if unknown := set(options.formats) - set(FORMATS):
        parser.error(f"no such format: {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    return options


def main():
    options = parse()
    folder, checkpoints = prepare(options)
    engines = [Cadre(options), LlamaCpp(options, folder)]
    results = {}
    for format in options.formats:
        models = [checkpoints.for_cadre(format), checkpoints.for_llama_cpp(format)]
        results[format] = {engine.name: {} for engine in engines}
        for number in range(options.rounds):
            for engine, model in zip(engines, models):
                print(f"{format}, round {number + 1} of {options.rounds}: {engine.name}", file=sys.stderr)
                for measured, figure in measure(engine, model, checkpoints.vocabulary(), options).items():
                    results[format][engine.name].setdefault(measured, []).append(figure)
    print(f"Preset {options.size}, {options.threads} threads, medians of {options.rounds} rounds; tokens per second\n")
    print(table(results, engines))
    if options.json:
        about = {"size": options.size, "threads": options.threads, "rounds": options.rounds, "figures": results}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
