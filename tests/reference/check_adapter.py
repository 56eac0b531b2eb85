"""The logits of the last token with an adapter that cadre wrote, by PEFT and transformers in f32, as JSON.

    python check_adapter.py MODEL_DIR ADAPTER_DIR TOKENS.json      # TOKENS.json: a list of token ids
"""

import argparse
import json
import pathlib

import torch

import adapters


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "adapter", "tokens"):
        parser.add_argument(name, type=pathlib.Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens = json.loads(arguments.tokens.read_text())
    with torch.no_grad():
        logits, _ = adapters.load(arguments.model, arguments.adapter)(torch.tensor([tokens]))
    print(json.dumps(logits[0, -1].tolist()))


if __name__ == "__main__":
    main()
