"""Trains cadre's built-in demo model: a small `bailing_moe_v2` that answers a few kinds of short questions, checkably.

    python models/embedded/train.py --out models/embedded                      # everything, see --help for the lengths
    python models/embedded/train.py --out models/embedded --evaluate           # the table of accuracies of what is there

It needs torch, tokenizers and safetensors, and no data: all text comes from the seeded generator in conversations.py. The
tokenizer is made first, then the model is trained with a constant learning rate for --steps steps and a falling one for
--decay-steps.

The weights beside this file took 90 minutes on 2 threads of an AMD EPYC (Zen 4, no AMX) that was compiling at the same
time: 4356 steps of 4096 tokens (17.8 M tokens), the last 1500 with a falling rate, at 2.5 to 6 thousand tokens a second.
The generator was changed during that run, at steps 1200, 2000, 2800 and 3900 (README.md says how), and the tokenizer dates
from its start. So a fresh run of this script makes a model of the same kind, not the same bits.
"""

import argparse
import functools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "reference"))
import bailing  # noqa: E402
from conversations import COINED, NAMES, NOUNS, PLACES, SYSTEMS, conversation, test_cases  # noqa: E402

# ---------------------------------------------------------------- the tokenizer

SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>"]
START, PAD, END = 0, 1, 2
TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- '<role>SYSTEM</role>' + message['content'] + '<|role_end|>' -}}
{%- elif message['role'] == 'user' -%}
{{- '<role>HUMAN</role>' + message['content'] + '<|role_end|>' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<role>ASSISTANT</role>' + message['content'] + '<|role_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<role>ASSISTANT</role>' -}}
{%- endif -%}
"""
# A word with the space before it, a word that starts the text; else letter by letter, digit by digit, sign by sign.
PIECES = r"\A\p{L}+| \p{L}+|\p{L}|\p{N}|[^\p{L}\p{N}]"


def make_tokenizer(vocab_size, seed=0):
    """Byte-level BPE whose vocabulary is the 256 bytes and the most frequent whole words of the generator's own phrases.

    There are no merges, and `ignore_merges` lets a whole word match at once: so every other word is spelt letter by letter,
    which is what spelling, reversing, counting and copying of unknown words want. Words to be worked on (NOUNS, NAMES,
    PLACES) are kept out of the vocabulary."""
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    rng = random.Random(seed)
    counts = Counter({"SYSTEM": 10**9, "HUMAN": 10**9, "ASSISTANT": 10**9})
    for turn, (q, a) in zip(range(60000), conversation(rng)):
        for text in ([a] if q == "system" else [q, a]):
            counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    for text in SYSTEMS * 100:
        counts.update(piece for piece, _ in split.pre_tokenize_str(text))
    content = {w.lower() for w in NOUNS + NAMES + PLACES}
    content |= {w[::-1] for w in content}
    coined = {w for word in COINED for w in (word, word[::-1])}

    def wanted(piece):
        word = piece.replace("Ġ", "").lower()
        by_chance = word in coined and counts[piece] < 60
        return word.isalpha() and word not in content and not by_chance and (len(word) > 1 or piece in ("Ġa", "ĠI"))

    words = [w for w, _ in counts.most_common() if wanted(w)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {}
    for token in SPECIALS + alphabet + words:
        if len(vocab) == vocab_size:
            break
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


# ---------------------------------------------------------------- batches


def prompt_text(q):
    return f"<role>HUMAN</role>{q}<|role_end|><role>ASSISTANT</role>"


def system_prompt(text):
    return f"<role>SYSTEM</role>{text}<|role_end|>"


def batch(rng, encode, tokens, late):
    """Rows of one length, each one long conversation; the mask marks what the assistant says."""
    length = rng.choices([96, 192, 384, 1024], [55, 33, 10, 2])[0]
    rows = max(1, tokens // length)
    ids = torch.full((rows, length + 1), PAD)
    mask = torch.zeros(rows, length + 1, dtype=torch.bool)
    for row in range(rows):
        at = 0
        for q, a in conversation(rng, late=late):
            parts = [(system_prompt(a), False)] if q == "system" else [(prompt_text(q), False), (a + "<|role_end|>", True)]
            for text, said in parts:
                piece = encode(text)[: length + 1 - at]
                ids[row, at : at + len(piece)] = torch.tensor(piece)
                mask[row, at : at + len(piece)] = said
                at += len(piece)
            if at > length:
                break
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]


# ---------------------------------------------------------------- evaluation


def render(before, q):
    text = "".join(system_prompt(a) if who == "system" else prompt_text(who) + a + "<|role_end|>" for who, a in before)
    return text + prompt_text(q)


@torch.no_grad()
def evaluate(model, encode, cases, rows=64):
    """Exact match of greedy decoding. If every token of the answer is the likeliest after the ones before it, then that
    is what greedy decoding writes: one forward over question and answer tells."""
    model.eval()
    table = {}
    for family, items in cases.items():
        encoded = sorted(((encode(render(b, q)), encode(a + "<|role_end|>")) for b, q, a in items), key=lambda x: len(x[0]))
        right = 0
        for at in range(0, len(encoded), rows):
            part = encoded[at : at + rows]
            width = max(len(p) + len(a) for p, a in part)
            ids = torch.tensor([p + a + [PAD] * (width - len(p) - len(a)) for p, a in part])
            mask = torch.zeros_like(ids, dtype=torch.bool)
            for row, (p, a) in enumerate(part):
                mask[row, len(p) : len(p) + len(a)] = True
            best = model(ids[:, :-1], select=mask[:, 1:]).argmax(-1)
            ok = (best == ids[:, 1:][mask[:, 1:]]).split([len(a) for _, a in part])
            right += sum(bool(x.all()) for x in ok)
        table[family] = right / len(encoded)
    model.train()
    return table


# ---------------------------------------------------------------- training


def config_for(tokenizer):
    return {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe_v2",
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "first_k_dense_replace": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.05,
        "intermediate_size": 512,
        "max_position_embeddings": 1024,
        "max_window_layers": 4,
        "moe_intermediate_size": 64,
        "moe_router_enable_expert_bias": True,
        "moe_router_enable_shared_expert": True,
        "moe_shared_expert_intermediate_size": 64,
        "mtp_loss_scaling_factor": 0,
        "n_group": 4,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "output_router_logits": False,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "rotary_dim": 16,
        "routed_scaling_factor": 2.5,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.56.1",
        "use_bias": False,
        "use_cache": True,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }


class Optimizer:
    """Muon (momentum, made orthogonal by five Newton-Schulz steps) for the matrices inside the layers; AdamW for the rest.

    A Muon step is scaled to the size of an AdamW step, so that one learning rate serves both."""

    def __init__(self, model, decay=0.02):
        self.step, self.decay = 0, decay
        shapes = {}
        self.rest = []
        for name, p in model.named_parameters():
            if p.ndim == 2 and ".layers." in name and "gate.weight" not in name:
                shapes.setdefault(p.shape, []).append(p)
            else:
                self.rest.append((p, torch.zeros_like(p), torch.zeros_like(p)))
        self.matrices = [(ps, torch.zeros(len(ps), *shape)) for shape, ps in shapes.items()]

    @torch.no_grad()
    def update(self, rate):
        self.step += 1
        for p, m, v in self.rest:
            if p.grad is None:
                continue
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.02)
            p.sub_(rate * (m / (1 - 0.9**self.step)) / ((v / (1 - 0.98**self.step)).sqrt() + 1e-10))
        for ps, momentum in self.matrices:
            grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in ps])
            momentum.lerp_(grad, 0.05)
            x = grad.lerp(momentum, 0.95).bfloat16()
            x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-12)
            turned = x.shape[1] > x.shape[2]
            x = x.mT if turned else x
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if turned else x
            x = x.float() * (0.2 * math.sqrt(max(x.shape[1:])))
            for p, u in zip(ps, x):
                p.mul_(1 - rate * self.decay).sub_(rate * u)


@torch.no_grad()
def balance(model, speed):
    """The selection bias of experts with few tokens rises, of those with many it falls: no auxiliary loss."""
    for layer in model.model.layers:
        if isinstance(layer.mlp, bailing.Moe):
            gate, counts = layer.mlp.gate, layer.mlp.counts
            gate.expert_bias += speed * (counts.float().mean() - counts).sign()
            gate.expert_bias -= gate.expert_bias.mean()


def rounded(model):
    """The weights as the checkpoint stores them: bf16 values (the selection bias too, in f32)."""
    return {
        k: v.detach().bfloat16().float() if k.endswith("expert_bias") else v.detach().bfloat16().contiguous()
        for k, v in model.state_dict().items()
    }


def export(model, tokenizer, out, weights_only=False):
    from safetensors.torch import save_file

    def put(name, text):
        (out / (name + ".part")).write_text(text)
        os.replace(out / (name + ".part"), out / name)

    save_file(rounded(model), out / "model.safetensors.part", metadata={"format": "pt"})
    os.chmod(out / "model.safetensors.part", 0o644)
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    if weights_only:
        return
    put("config.json", json.dumps(model.config, indent=2) + "\n")
    put("generation_config.json", json.dumps({"do_sample": False, "eos_token_id": [END, PAD], "pad_token_id": PAD}, indent=2) + "\n")
    put("chat_template.jinja", TEMPLATE)
    put("tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), indent=1, ensure_ascii=False) + "\n")
    put("tokenizer_config.json", json.dumps({
        "add_bos_token": False, "add_eos_token": False, "bos_token": SPECIALS[START], "eos_token": SPECIALS[END],
        "pad_token": SPECIALS[PAD], "clean_up_tokenization_spaces": False, "model_max_length": model.config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE,
    }, indent=2) + "\n")  # fmt: skip


def show(table):
    return " ".join(f"{f}/{'1' if s == 'alone' else 'n'}={100 * a:.0f}" for (f, s), a in table.items())


def seconds_between(a, b):
    minutes = [60 * int(t[:2]) + int(t[3:5]) for t in (a, b)]
    return 60 * (minutes[1] - minutes[0])


def seconds_to(end):
    return seconds_between(time.strftime("%H:%M"), end) - int(time.strftime("%S"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the training state is kept (default: --out)")
    parser.add_argument("--steps", type=int, default=6000, help="steps at the full learning rate")
    parser.add_argument("--decay-steps", type=int, default=2000, help="steps in which it falls to zero")
    parser.add_argument("--shift", type=int, default=1200, help="step at which the second weights of FAMILIES begin")
    parser.add_argument("--until", help="HH:MM at which to start the decay, even before --steps")
    parser.add_argument("--end", help="HH:MM at which the rate is zero, even before --decay-steps")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=640)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=400, help="steps between evaluations")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what is in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    if args.evaluate:
        return report(args.out)

    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json")) if args.resume else make_tokenizer(args.vocab, args.seed)
    encode = functools.lru_cache(20000)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    model = bailing.init(bailing.build(config_for(tokenizer)), args.seed)
    optimizer = Optimizer(model)
    state_file = (args.work or args.out) / "train_state.pt"
    rng = random.Random(args.seed + 1)
    first, decay_from = 0, args.steps
    if args.resume:
        state = torch.load(state_file, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer, rng, first = state["optimizer"], state["rng"], state["step"]
        fresh = Optimizer(model)  # attach the moments to the live parameters
        fresh.step = optimizer.step
        fresh.rest = [(new[0], old[1], old[2]) for new, old in zip(fresh.rest, optimizer.rest)]
        fresh.matrices = [(new[0], old[1]) for new, old in zip(fresh.matrices, optimizer.matrices)]
        optimizer = fresh
    else:
        export(model, tokenizer, args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {tokenizer.get_vocab_size()}", flush=True)
    quick = test_cases(7, 20)

    started, seen, losses = time.time(), 0, []
    step = first
    while step < decay_from + args.decay_steps:
        if step < decay_from and args.until and time.strftime("%H:%M") >= args.until:
            decay_from = step
            print(f"decay starts at step {step}", flush=True)
        left = (decay_from + args.decay_steps - step) / args.decay_steps
        if step >= decay_from and args.until and args.end:
            left = min(left, seconds_to(args.end) / seconds_between(args.until, args.end))
            if left <= 0:
                break
        rate = args.rate * min(1, (step + 1) / 100, left)
        ids, labels, mask = batch(rng, encode, args.tokens, int(step >= args.shift))
        logits = model(ids, select=mask)
        loss = F.cross_entropy(logits, labels[mask])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.update(rate)
        balance(model, 1e-3 if step < decay_from else 1e-3 * rate / args.rate)
        seen += ids.numel()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            used = time.time() - started
            print(f"{time.strftime('%H:%M:%S')} step {step} loss {sum(losses) / len(losses):.4f} rate {rate:.2e} {seen / used:.0f} tokens/s", flush=True)
            losses = []
        if step % args.every == 0:
            live = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict({k: v.float() for k, v in rounded(model).items()})
            print("  " + show(evaluate(model, encode, quick)), flush=True)
            export(model, tokenizer, args.out)
            model.load_state_dict(live)
            torch.save({"model": model.state_dict(), "optimizer": optimizer, "rng": rng, "step": step}, state_file)
    export(model, tokenizer, args.out)
    print(f"{step} steps, decay from {decay_from}", flush=True)
    report(args.out)


def report(out):
    """The table of accuracies of the files in `out`, and heldout.jsonl beside them."""
    from safetensors.torch import load_file

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    encode = functools.lru_cache(20000)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    model = bailing.build(json.loads((out / "config.json").read_text()))
    model.load_state_dict({k: v.float() for k, v in load_file(out / "model.safetensors").items()})
    cases = test_cases(11, 200)
    in_f32 = evaluate(model, encode, cases)
    in_bf16 = evaluate(model.bfloat16(), encode, cases)
    print("| family | setting | f32 | bf16 |\n|---|---|---|---|")
    for (family, setting), right in in_f32.items():
        print(f"| {family} | {setting} | {100 * right:.1f} % | {100 * in_bf16[family, setting]:.1f} % |")
    with open(out / "heldout.jsonl", "w") as f:
        for (family, setting), rows in cases.items():
            if setting == "alone" and in_f32[family, setting] >= 0.95:
                for _, q, a in rows:
                    f.write(json.dumps({"family": family, "prompt": q, "answer": a}) + "\n")


if __name__ == "__main__":
    main()
