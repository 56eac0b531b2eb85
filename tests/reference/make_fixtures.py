"""Makes the parity fixtures: tiny random checkpoints as on the hub, and what a reference makes of them.

    python make_fixtures.py [--only PATTERN]

Each folder tests/fixtures/parity/<architecture>-<variant>/ gets config.json, the weights and
expected.safetensors (input_ids, logits_f32, logits_bf16). See README.md.
"""

import argparse
import fnmatch
import json
import math
import pathlib
import shutil
import time

import torch
from safetensors.torch import save_file

import reference
from hub_tensors import hub_tensors
from variants import VARIANTS, config_of

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "parity"
SEQUENCES = 2
CANDIDATES = 32  # tokens tried per position
DECISIVE = 0.12  # a routing margin that bf16 rounding doesn't cross, in units of router logits
LEAST_MARGIN = 1e-4  # between the last expert taken and the first one left, as scores
SMALL_ERROR = 0.02  # of bf16, of the greatest logit; the best seed is taken if none gets there
ATTEMPTS = 10  # seeds tried per variant

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
DTYPE_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def random_tensor(name, shape, generator):
    values = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * values
    if name.endswith("expert_bias"):
        return 0.15 * values
    if name.endswith(".bias"):
        return 0.2 * values
    if "embed" in name:
        return 0.4 * values
    if name.endswith("gate.weight"):
        return 2.0 / math.sqrt(shape[1]) * values
    if name == "lm_head.weight":
        return 0.2 * values
    return 1.1 / math.sqrt(shape[1]) * values


def write_checkpoint(folder, config, options, seed):
    """config.json and the weights, in one file or in shards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[options.get("dtype", "bf16")]
    tensors = {}
    for name, shape in hub_tensors(config).items():
        kept = torch.float32 if name.endswith("expert_bias") else dtype  # so on the hub
        tensors[name] = random_tensor(name, shape, generator).to(kept)
    shards = options.get("shards", 1)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    shard_of = {name: i * shards // len(names) + 1 for i, name in enumerate(names)}
    files = {name: f"model-{shard:05}-of-{shards:05}.safetensors" for name, shard in shard_of.items()}
    for file in sorted(set(files.values())):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def choose_tokens(model, vocab, tokens, generator):
    """Sequences whose routing is decisive everywhere: token by token, of some random candidates
    the first one (else the best) whose worst margin over the layers suffices."""
    sequences = []
    for _ in range(SEQUENCES):
        sequence = torch.empty(0, dtype=torch.long)
        for _ in range(tokens):
            candidates = torch.randperm(vocab, generator=generator)[:CANDIDATES]
            batch = torch.cat([sequence.expand(len(candidates), -1), candidates[:, None]], 1)
            _, routings = model(batch)
            margins = torch.stack([r.logit_margin[:, -1] for r in routings]).amin(0)
            enough = (margins > DECISIVE).nonzero()
            best = enough[0, 0] if len(enough) else margins.argmax()
            sequence = batch[best]
        sequences.append(sequence)
    return torch.stack(sequences)


def run(folder, config, options, seed):
    """A checkpoint from a seed, and what the reference makes of it."""
    write_checkpoint(folder, config, options, seed)
    model = reference.load(folder, torch.float32)
    generator = torch.Generator().manual_seed(1000 + seed)
    input_ids = choose_tokens(model, config["vocab_size"], options.get("tokens", 37), generator)
    logits, routings = model(input_ids)
    low, low_routings = reference.load(folder, torch.bfloat16)(input_ids)
    low = low.float()
    expected = {"input_ids": input_ids, "logits_f32": logits.contiguous(), "logits_bf16": low.contiguous()}
    margin = min(r.score_margin.min().item() for r in routings)
    flips = sum((a.chosen != b.chosen).any(-1).sum().item() for a, b in zip(routings, low_routings))
    error = ((low - logits).abs().max() / logits.abs().max()).item()
    return expected, (flips > 0 or margin < LEAST_MARGIN, error), margin


def make(name, family, changes, options):
    folder = FIXTURES / name
    config = config_of(family, changes)
    config["torch_dtype"] = DTYPE_NAMES[options.get("dtype", "bf16")]
    tried = {}
    for seed in range(1, ATTEMPTS + 1):
        tried[seed] = run(folder, config, options, seed)[1]
        if tried[seed] < (False, SMALL_ERROR):
            break
    seed = min(tried, key=tried.get)
    expected, (bad, error), margin = run(folder, config, options, seed)
    if bad:
        raise SystemExit(f"{name}: no seed routes decisively")
    save_file(expected, folder / "expected.safetensors")
    logits = expected["logits_f32"]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{name:32} seed {seed:2}  {size / 1e3:4.0f} kB  |logits| max {logits.abs().max():5.2f} std {logits.std():4.2f}"
        f"  score margin {margin:.1e}  bf16 error, of the greatest logit: max {error:.1e}"
        f" mean {(expected['logits_bf16'] - logits).abs().mean() / logits.abs().max():.1e}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="fixtures to make, as a shell pattern")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    with torch.no_grad():
        for name, family, changes, options in VARIANTS:
            if fnmatch.fnmatch(name, arguments.only):
                make(name, family, changes, options)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
