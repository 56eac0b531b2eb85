"""Answers a file of requests on all machines of a Ray cluster: each runs `cadre batch` on a part at a time. See ../scale-out.md.

    python ray_batch.py -i requests.jsonl -o results.jsonl --work /shared/run-1 cadre batch --model /models/ling-q4

What follows the options is the command to run on each part. The results are those of that command on the whole file, byte for
byte. Parts and their results lie in the work folder, which all machines have to see under the same name. Whatever dies, the same
command goes on.
"""

import argparse
import itertools
import os
import pathlib
import shutil
import subprocess

import ray


def split(requests, work, lines):
    """Writes the parts and returns their paths. Each begins with blank lines in place of what comes before it, and was last
    written when the whole was: so line numbers, ids, seeds and times are those of the whole."""
    parts, modified = [], os.stat(requests).st_mtime_ns
    with open(requests, "rb") as whole:
        for before in itertools.count(0, lines):
            part = list(itertools.islice(whole, lines))
            if not part:
                return parts
            path = work / f"{before:012}.jsonl"
            unfinished = path.with_suffix(".unfinished")
            with open(unfinished, "wb") as file:
                file.write(b"\n" * before)
                file.writelines(part)
            os.utime(unfinished, ns=(modified, modified))
            unfinished.replace(path)
            parts.append(path)


def results_of(part):
    return part.with_suffix(".results.jsonl")


def answer(row, command):
    """Runs the command on a part. It ends with its worker: whoever is given the part next goes on with the same output."""
    part = pathlib.Path(row["part"])
    with_worker = ["setpriv", "--pdeathsig", "KILL"]
    subprocess.run([*with_worker, *command, "-i", part, "-o", results_of(part), "--ordered"], check=True)
    return row


def join(files, output):
    unfinished = f"{output}.unfinished"
    with open(unfinished, "wb") as whole:
        for path in files:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, whole)
    os.replace(unfinished, output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--input", required=True, help="requests, as in docs/batch.md, neither compressed nor a pipe")
    parser.add_argument("-o", "--output", required=True, help="their answers, in the same order")
    parser.add_argument("--work", required=True, type=pathlib.Path, help="a folder of this run that all machines see")
    parser.add_argument("--lines", type=int, default=10_000, help="lines of a part: each loads the model anew [10000]")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="cadre batch, and its flags for the model")
    args = parser.parse_args()

    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    parts = split(args.input, work, args.lines)
    ray.init()
    # As many CPUs as the smallest machine has: it works on one part at a time.
    cpus = min(node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"])
    rows = ray.data.from_items([{"part": str(part)} for part in parts], override_num_blocks=len(parts))
    rows.map(answer, fn_args=[args.command], num_cpus=cpus).materialize()
    results = [results_of(part) for part in parts]
    join(results, args.output)
    errors = [path.with_name(f"{path.name}.errors.jsonl") for path in results]
    if any(path.exists() for path in errors):
        join(filter(pathlib.Path.exists, errors), f"{args.output}.errors.jsonl")


if __name__ == "__main__":
    main()
