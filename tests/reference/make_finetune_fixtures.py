"""Makes the fixtures of fine-tuning: what PEFT, transformers and torch make of tiny checkpoints in 50 steps.

    python make_finetune_fixtures.py [--only PATTERN]

Each folder tests/fixtures/finetune/<family>-<case>/ gets case.json, expected.safetensors and, unless every parameter
is trained, the adapter to begin with. tests/fixtures/finetune/adapters/ gets adapters in PEFT's layouts and the logits
with them. The models are those of make_fixtures.py. See README.md.
"""

import argparse
import fnmatch
import json
import pathlib
import shutil
import time

import peft
import torch
import transformers
from safetensors.torch import save_file

import adapters
import finetune

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
FAMILIES = ["qwen3_moe", "olmoe", "bailing_moe_v2"]
SEED = 1
# f32 against f64, relative: what rounding moves by more could not be reproduced to 1e-5 at step 1 and 1e-4 at the last.
MOST_ROUNDING = {"first_loss": 1e-6, "loss": 1e-5, "gradient": 1e-5, "final": 5e-5}
VERSIONS = {library.__name__: library.__version__ for library in (torch, transformers, peft)}


def final_values(values, full):
    """The trained tensors after the last step; of a fully trained model some of each kind."""
    if not full:
        return values
    kept = ("embed", "layers.1.mlp.experts.", "layers.1.input_layernorm")
    return {name: tensor for name, tensor in values.items() if any(part in name for part in kept)}


def greatest_error(tensors, precise):
    """Of any tensor: the length of the difference over the tensor's."""
    pairs = [(tensor.double(), precise[name].double()) for name, tensor in tensors.items()]
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def case_json(base, config, case, least, rounding):
    lora = finetune.lora_config(config["model_type"], case)
    return {
        "model": base,
        "model_type": config["model_type"],
        "mode": "full" if case.full else "lora",
        "dtype": "float32",
        "rank": lora and lora.r,
        "alpha": lora and lora.lora_alpha,
        "target_modules": lora and sorted(lora.target_modules),
        "target_parameters": lora and sorted(lora.target_parameters or []),
        "steps": finetune.STEPS,
        "learning_rate": case.learning_rate,
        "betas": finetune.BETAS,
        "eps": finetune.EPS,
        "weight_decay": finetune.WEIGHT_DECAY,
        "max_grad_norm": finetune.MAX_GRAD_NORM,
        "router_aux_loss_coef": case.balance,
        "router_z_loss_coef": case.z,
        "least_score_margin": least,
        "f32_against_f64": rounding,
        "definitions": {
            **finetune.DEFINITIONS,
            "probabilities": finetune.DEFINITIONS["probabilities"][config["model_type"]],
        },
        "versions": VERSIONS,
    }


def make_case(folder, family, case):
    base = f"parity/{family}-base"
    config = json.loads((FIXTURES / base / "config.json").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = finetune.Trained(FIXTURES / base, config, case, SEED, torch.float32)
    if not case.full:
        adapters.save(model.adapter, base, folder, "init.safetensors")
    generator = torch.Generator().manual_seed(1000 + SEED)
    series, gradients, least, batches = finetune.train(model, generator)

    precise = finetune.Trained(FIXTURES / base, config, case, SEED, torch.float64)
    precise_series, precise_gradients, *_ = finetune.train(precise, batches)
    final = final_values(model.values(), case.full)
    losses = [abs(a - b) / b for a, b in zip(series["loss"], precise_series["loss"])]
    rounding = {
        "first_loss": losses[0],
        "loss": max(losses),
        "gradient": greatest_error(gradients, precise_gradients),
        "final": greatest_error(final, precise.values()),
    }
    if any(rounding[what] > MOST_ROUNDING[what] for what in rounding):
        raise SystemExit(f"{folder.name}: rounding moves it by {rounding}")

    expected = {
        "input_ids": torch.stack([input_ids for input_ids, _ in batches]).to(torch.int32),
        "loss_mask": torch.stack([loss_mask for _, loss_mask in batches]).to(torch.uint8),
    }
    kept = ["loss", "grad_norm"] + ["aux_loss"] * (case.balance > 0) + ["z_loss"] * (case.z > 0)
    expected.update({name: torch.tensor(series[name], dtype=torch.float64) for name in kept})
    expected.update({f"grad.{name}": gradient for name, gradient in gradients.items()})
    expected.update({f"final.{name}": tensor for name, tensor in final.items()})
    save_file(expected, folder / "expected.safetensors")
    text = json.dumps(case_json(base, config, case, least, rounding), indent=2)
    (folder / "case.json").write_text(text + "\n")

    size = sum(file.stat().st_size for file in folder.iterdir())
    norms = series["grad_norm"]
    print(
        f"{folder.name:26} {size / 1e3:4.0f} kB  {len(gradients):3} tensors  loss {series['loss'][0]:.3f} to"
        f" {series['loss'][-1]:.3f}  norm {min(norms):.2f} to {max(norms):.2f}  score margin {least:.1e}"
        f"  f32 error: {', '.join(f'{what} {error:.0e}' for what, error in rounding.items())}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="fixtures to make, as a shell pattern")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    for family in FAMILIES:
        for name, case in finetune.CASES.items():
            if fnmatch.fnmatch(f"{family}-{name}", arguments.only):
                make_case(FIXTURES / "finetune" / f"{family}-{name}", family, case)
    for family in adapters.FAMILIES:
        for layout in adapters.LAYOUTS:
            if fnmatch.fnmatch(f"adapters/{family}-{layout}", arguments.only):
                adapters.make(FIXTURES, family, layout)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
