"""Adapters in PEFT's layouts: to save them, to load them and to read them oneself; and the fixtures of reading.

A routed expert's LoRA lies in one of two layouts, E experts of rank r below `base_model.model.model.layers.N.mlp.`:

    fused        `experts.lora_A.weight` [E*r, in] and `experts.lora_B.weight` [out, r*E] for a whole stack (A lists the
                 experts one after the other, B interleaves them). The stack is `down_proj`, or the only one in
                 `target_parameters`; of two, `gate_up_proj` has `experts.base_layer.lora_A`.
    per-expert   `experts.{e}.gate_proj.lora_A.weight` [r, in], `...lora_B.weight` [out, r], and so on
"""

import json
import pathlib
import shutil
import tempfile

import peft
import torch
from safetensors.torch import load_file, save_file

import reference

FAMILIES = ["qwen3_moe", "olmoe"]
LAYOUTS = ["fused", "fused-down-only", "per-expert"]
RANK, ALPHA = 3, 9  # a rank that isn't the number of experts: else axes could be taken for each other
SEQUENCES, TOKENS = 2, 13
LEAST_MARGIN = 2e-4  # of routers with the adapter, as scores
LEAST_CHANGE = 0.05  # that the adapter makes, of the greatest logit
SAME = 1e-5  # the same logits by two ways, of the greatest logit
PREFIX = "base_model.model."


def randomise(tensors, generator):
    """A and B by name, in the order of their names; B isn't zero, so every gradient is there at once."""
    for name, tensor in sorted(tensors.items()):
        scale = tensor.shape[1] ** -0.5 if ".lora_A." in name else 0.05
        tensor.data = (scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


def save(model, base, folder, weights="adapter_model.safetensors"):
    """The adapter as PEFT writes it, its config without what changes from run to run or tells of this machine."""
    model.peft_config["default"].base_model_name_or_path = base
    with tempfile.TemporaryDirectory() as saved:
        saved = pathlib.Path(saved)
        model.save_pretrained(saved, save_embedding_layers=False)
        shutil.move(saved / "adapter_model.safetensors", folder / weights)
        write_config(json.loads((saved / "adapter_config.json").read_text()), folder)


def write_config(config, folder):
    """adapter_config.json, lists sorted: PEFT keeps them as sets."""
    config = {key: sorted(value) if isinstance(value, (list, set)) else value for key, value in sorted(config.items())}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(model_folder, adapter_folder):
    """The reference of a checkpoint in f32, with an adapter that PEFT loads into it."""
    model = reference.load(model_folder, torch.float32)
    config = peft.PeftConfig.from_pretrained(adapter_folder)
    if isinstance(model.model, reference.bailing.BailingMoe):
        config.task_type = None  # PEFT asks the model of a task for methods of transformers'
    adapter = peft.PeftModel.from_pretrained(model.model, adapter_folder, config=config)
    # PEFT only warns of tensors that the file lacks, and says nothing of those that it has no place for.
    result = adapter.load_adapter(adapter_folder, "default")
    if result.missing_keys or result.unexpected_keys:
        raise SystemExit(f"{adapter_folder}: missing {result.missing_keys}, without a place {result.unexpected_keys}")
    return model


def read(folder):
    """Our own reading of an adapter: what it adds to each of transformers' parameters, by name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    both = len(config["target_parameters"] or []) == 2
    deltas, of_experts = {}, {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        target = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        stack, _, of_one = target.partition(".mlp.experts")
        stack += ".mlp.experts"
        if ".mlp.experts" not in target:
            deltas[target + ".weight"] = scale * b @ a
        elif of_one in ("", ".base_layer"):
            kind = "gate_up_proj" if both and of_one else "down_proj" if both else only_parameter(config)
            a, b = a.reshape(-1, config["r"], a.shape[1]), b.reshape(b.shape[0], config["r"], -1)
            deltas[f"{stack}.{kind}"] = scale * torch.einsum("eri,ore->eoi", a, b)
        else:
            _, expert, kind = of_one.split(".")
            of_experts.setdefault(stack, {}).setdefault(int(expert), {})[kind] = scale * b @ a
    for stack, experts in of_experts.items():
        experts = [experts[e] for e in range(len(experts))]
        deltas[f"{stack}.gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in experts])
        deltas[f"{stack}.down_proj"] = torch.stack([e["down_proj"] for e in experts])
    return deltas


def only_parameter(config):
    (parameter,) = config["target_parameters"]
    return parameter.rpartition(".")[2]


def write(model_folder, base, layout, folder, generator):
    """A random adapter of attention's q_proj and of experts."""
    model = reference.load(model_folder, torch.float32).model
    common = {"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    if layout != "per-expert":
        parameters = ["mlp.experts.down_proj"] + ["mlp.experts.gate_up_proj"] * (layout == "fused")
        config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=parameters, **common)
        model = peft.get_peft_model(model, config)
        randomise({name: p for name, p in model.named_parameters() if ".lora_" in name}, generator)
        save(model, base, folder)
        return
    # What PEFT wrote when transformers' experts were linears: one pair for each of them.
    shapes = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        *_, rows, columns = parameter.shape if parameter.dim() > 1 else (0, 0)
        if module.endswith("q_proj"):
            shapes[module] = rows, columns
        elif kind == "gate_up_proj":
            for e in range(len(parameter)):
                shapes[f"{module}.{e}.gate_proj"] = shapes[f"{module}.{e}.up_proj"] = rows // 2, columns
        elif kind == "down_proj":
            shapes.update({f"{module}.{e}.down_proj": (rows, columns) for e in range(len(parameter))})
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.empty(RANK, columns)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.empty(rows, RANK)
    randomise(tensors, generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], **common)
    config.base_model_name_or_path = base
    config.inference_mode = True  # as PEFT saves it
    write_config({key: getattr(value, "value", value) for key, value in config.to_dict().items()}, folder)


@torch.no_grad()
def make(fixtures, family, layout, seed=1):
    """One folder of tests/fixtures/finetune/adapters: an adapter, tokens, and the logits with it."""
    base = f"parity/{family}-base"
    model_folder, folder = fixtures / base, fixtures / "finetune" / "adapters" / f"{family}-{layout}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    write(model_folder, base, layout, folder, generator)

    model = load(model_folder, folder)
    vocab, margin = model.model.config.vocab_size, 0.0
    while margin < LEAST_MARGIN:
        input_ids = torch.randint(vocab, (SEQUENCES, TOKENS), generator=generator)
        logits, routings = model(input_ids)
        margin = min(routing.score_margin.min().item() for routing in routings)

    plain = reference.load(model_folder, torch.float32)
    greatest = logits.abs().max()
    change = ((plain(input_ids)[0] - logits).abs().max() / greatest).item()
    assert change > LEAST_CHANGE, f"{folder.name}: the adapter changes the logits by {change} only"
    parameters = dict(plain.model.named_parameters())
    for name, delta in read(folder).items():
        parameters[name] += delta
    difference = ((plain(input_ids)[0] - logits).abs().max() / greatest).item()
    assert difference < SAME, f"{folder.name}: read by ourselves, the logits differ by {difference}"

    expected = {"input_ids": input_ids.to(torch.int32), "logits": logits.contiguous()}
    save_file(expected, folder / "expected.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"adapters/{folder.name:26} {size / 1e3:4.0f} kB  of the greatest logit: change {change:.2f}, our own reading"
        f" {difference:.0e}  score margin {margin:.1e}",
        flush=True,
    )
