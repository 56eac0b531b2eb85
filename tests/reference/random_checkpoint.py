"""Writes a random bf16 qwen3_moe checkpoint of real shape, for benchmarks.

    python random_checkpoint.py --output DIR --preset a [--skew 0.5] [--set hidden_size=512 ...] [--tokenizer DIR]

Preset a has 0.95 B parameters, b 6.8 B. Without --tokenizer the folder gets a made-up byte-level BPE that fills
the vocabulary, so that every token has a text.

With --skew S each expert's row of the router is scaled by exp(S z), z normal, so that some experts are chosen more
often: in preset a, random tokens give the busiest eighth of a layer's experts this share of the choices:

| --skew | first layer | the others |
|---|---|---|
| 0 | 23 % | 31 to 43 %: what layers add makes hidden states alike |
| 0.25 | 27 % | 36 to 42 % |
| 0.5 | 32 % | 41 to 48 % |
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hub_tensors import hub_tensors
from variants import config_of

PRESETS = {
    "a": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 256,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1024,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 49152,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHARD = 2 << 30  # bytes


def made_up_tokenizer(size):
    """All bytes, then the pairs of small letters (a blank may lead), then pairs of those."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    blank = "\u0120"  # how byte-level BPE writes one
    pairs = [(x, y) for x in [blank, *letters] for y in letters]
    inner = [pair for pair in pairs if pair[0] != blank]
    room = size - len(vocab) - len(pairs) - len(SPECIAL)
    count = len(pairs) * len(inner)
    if not 0 <= room <= count:
        raise SystemExit(f"no made-up tokenizer has {size} tokens")
    spread = [i * count // room for i in range(room)]
    quads = [("".join(pairs[i // len(inner)]), "".join(inner[i % len(inner)])) for i in spread]
    merges = pairs + quads
    for merge in merges:
        vocab["".join(merge)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def write_tokenizer(folder, config, source):
    if source:
        for file in pathlib.Path(source).glob("tokenizer*.json"):
            shutil.copy(file, folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if tokenizer.get_vocab_size() > config["vocab_size"]:
            raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config['vocab_size']}")
        return
    tokenizer = made_up_tokenizer(config["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config["bos_token_id"] = tokenizer.token_to_id("<|endoftext|>")
    config["eos_token_id"] = tokenizer.token_to_id("<|im_end|>")
    about = {
        "add_bos_token": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "model_max_length": config["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def shards_of(shapes):
    """Names in order, grouped to about SHARD bytes."""
    groups, size = [[]], 0
    for name, shape in shapes.items():
        grown = 2 * torch.Size(shape).numel()
        if size + grown > SHARD and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += grown
    return groups


def write_weights(folder, config, seed, skew):
    shapes = hub_tensors(config)
    groups = shards_of(shapes)
    generator = torch.Generator().manual_seed(seed)
    skews = torch.Generator().manual_seed(seed + 1)  # its own, so that the rest is the same with and without
    index, total = {}, 0
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for name in names:
            if name.endswith("norm.weight"):
                tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            else:
                values = torch.empty(shapes[name]).normal_(0, 0.02, generator=generator)
                if name.endswith("mlp.gate.weight"):  # [experts, hidden]
                    values *= torch.exp(skew * torch.randn(shapes[name][0], 1, generator=skews))
                tensors[name] = values.bfloat16()
            total += tensors[name].numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    if len(groups) > 1:
        whole = {"metadata": {"total_size": 2 * total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(whole, indent=2) + "\n")
    print(f"{total / 1e9:.3f} B parameters in {len(groups)} file(s)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--preset", choices=PRESETS, default="a")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="overrides of config.json")
    parser.add_argument("--tokenizer", help="folder whose tokenizer*.json to copy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.0, metavar="S", help="how uneven the experts' use is")
    arguments = parser.parse_args()
    overrides = {key: json.loads(value) for key, value in (item.split("=", 1) for item in arguments.set)}
    config = config_of("qwen3_moe", {**PRESETS[arguments.preset], **overrides})
    config["max_window_layers"] = config["num_hidden_layers"]
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(arguments.output, config, arguments.tokenizer)
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_weights(arguments.output, config, arguments.seed, arguments.skew)


if __name__ == "__main__":
    main()
