"""Fine-tuning by cadre and by PEFT in turn: tokens a second of each step, and the peak memory.

    python finetune.py --model DIR --cadre BINARY [--threads 2] [--batch 4] [--length 512] [--steps 3] [--rounds 2] [--peft-dtype bfloat16]

The model is a Qwen3-MoE checkpoint with a tokenizer, such as tests/reference/random_checkpoint.py makes (--preset a). Both
train LoRA of rank 8 on the same number of random tokens, on attention alone (q, k, v, o) and on attention and experts: cadre
in bf16, PEFT in what --peft-dtype says. PEFT runs in a process of its own each time, with transformers' grouped experts. Needs
torch, transformers, peft and accelerate.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def peft_steps(arguments):
    """Trains in this process; prints one JSON object."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.peft_dtype), experts_implementation="grouped_mm"
    )
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if arguments.experts else None
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=ATTENTION, target_parameters=experts, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    speeds = []
    for _ in range(arguments.steps):
        ids = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.length), generator=generator)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(ids.numel() / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"speeds": speeds, "peak_mib": peak}))


def run_peft(arguments, experts):
    command = [sys.executable, __file__, "--peft", "--model", arguments.model, "--cadre", "none"]
    for name in ("threads", "batch", "length", "steps", "peft-dtype"):
        command += [f"--{name}", str(getattr(arguments, name.replace("-", "_")))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
    command += ["--experts"] if experts else []
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run_cadre(arguments, experts, data):
    with tempfile.TemporaryDirectory() as output:
        targets = ",".join(ATTENTION + (["experts"] if experts else []))
        command = [arguments.cadre, "finetune", "--model", arguments.model, "--data", data, "--output", output]
        command += ["--targets", targets, "--rank", "8", "--max-length", str(arguments.length), "--save-every", "0"]
        command += ["--batch-size", str(arguments.batch), "--max-steps", str(arguments.steps), "--report-to", "none"]
        command += ["--threads", str(arguments.threads)]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (pathlib.Path(output) / "train_log.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["type"] == "step"]
        peak = steps[-1]["peak_memory_bytes"] / (1 << 20)
        return {"speeds": [step["tokens_per_second"] for step in steps], "peak_mib": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cadre", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peft-dtype", default="bfloat16", help="float32 is faster where the processor has no bf16 product")
    parser.add_argument("--peft", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--experts", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peft:
        return peft_steps(arguments)
    random.seed(1)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(3, 9))) for _ in range(5000)]
    lines = [json.dumps({"text": " ".join(random.choices(words, k=2 * arguments.length))}) for _ in range(64)]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as data:
        data.write("\n".join(lines) + "\n")
        data.flush()
        for experts in (False, True):
            found = {"cadre": [], "PEFT": []}
            peaks = {}
            for _ in range(arguments.rounds):
                for name, run in (("cadre", lambda: run_cadre(arguments, experts, data.name)), ("PEFT", lambda: run_peft(arguments, experts))):
                    result = run()
                    # The first step warms up.
                    found[name] += result["speeds"][1:]
                    peaks[name] = max(peaks.get(name, 0), result["peak_mib"])
            medians = {name: statistics.median(speeds) for name, speeds in found.items()}
            what = "attention and experts" if experts else "attention"
            for name in found:
                print(f"{what}, {arguments.batch} x {arguments.length}, {name}: {medians[name]:.0f} tokens/s, {peaks[name]:.0f} MiB")
            print(f"{what}: {medians['cadre'] / medians['PEFT']:.2f} times as fast, {peaks['cadre'] / peaks['PEFT']:.2f} of the memory")


if __name__ == "__main__":
    main()
