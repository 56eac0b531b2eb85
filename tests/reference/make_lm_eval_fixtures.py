"""Makes the fixtures of lm-evaluation-harness: a tokenizer, items, and what `lm_eval --model hf` makes of them in f32.

    python make_lm_eval_fixtures.py

The model is tests/fixtures/parity/qwen3_moe-base, which has no tokenizer of its own. See README.md.
"""

import itertools
import json
import os
import pathlib
import random
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import decoders, models, normalizers

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
MODEL, FOLDER = FIXTURES / "parity" / "qwen3_moe-base", FIXTURES / "lm_eval"
TASKS = ["cadre_choices", "cadre_last_words", "cadre_texts", "cadre_answers"]
MAX_LENGTH = 62  # of `hf`; local-completions cuts texts at the same places if its `max_length` is two more
UNTIL, MAX_GEN_TOKS = ["b", " t"], 16  # as in tasks/answers.yaml
LEAST_MARGIN = 1e-5  # of routers, as scores, and of the likeliest token, as logits: rounding decides nothing
NEAR_TIE = (5e-5, 5e-4)  # of the two likeliest tokens: whoever rounds, or compares to 1e-3, takes both for the greedy one

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = ["<0xC3>", "<0xA9>", "<0xA8>", "<0xAA>"]  # "é", "è" and "ê" are two tokens each, all of which alone read "�"
CHARACTERS = list("▁abcdefghijklmnopqrstuvwxyz.,?!0123456789\n")
MERGES = (
    "▁ t, h e, ▁t he, ▁ a, i n, ▁ s, e r, ▁ w, ▁ c, o n, ▁ b, ▁ o, ▁ f, e n, a n, r e, ▁ i, o u, a t, e s, ▁ m, ▁ h, ▁ p, "
    "i t, o r, ▁ d, in g, ▁ l, ▁ n, an d, e d, s t, ▁ k, l l, ▁ r, e a, ▁ g, ▁o f, i s, a r, o w, ▁ e, ▁ v, v e, l e, e l, u n"
).split(", ")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}, {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant,{% endif %}"
)
WORDS = (
    "the a river runs past an old mill and then under stone bridge where boys fish for trout until evening comes "
    "no one knows who built it or when but miller says his father was born here in that house with green café "
    "door élan crème fête 7 30 12 she sings to horses they listen what is there after rain sun"
).split()


def save_tokenizer(folder):
    """BPE with the space as a part of words, so that a text's tokens begin with those of its beginning."""
    merges = [tuple(merge.split()) for merge in MERGES]
    vocab = SPECIAL + BYTES + CHARACTERS + ["".join(merge) for merge in merges]
    vocab_size = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    assert len(vocab) == len(set(vocab)) == vocab_size, f"{len(vocab)} tokens for a model of {vocab_size}"
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Margins:
    """How near any router, and any choice of the likeliest token, came to a tie."""

    def __init__(self, model):
        self.least = float("inf")
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(lambda router, _, out: self.see(out[0].float().softmax(-1), router.top_k))
        model.register_forward_hook(lambda model, _, out: self.see(out.logits, 1))

    def see(self, scores, taken):
        ranked = scores.topk(taken + 1, -1).values
        self.least = min(self.least, (ranked[..., -2] - ranked[..., -1]).min().item())


def continuation(lm, context, tokens):
    """The greedy one; none if it has special tokens, or is a text with other tokens than those that were chosen."""
    ids = lm.tokenizer.encode(context, add_special_tokens=False)
    chosen = []
    for _ in range(tokens):
        chosen.append(int(lm.model(torch.tensor([ids + chosen])).logits[0, -1].argmax()))
    text = lm.tokenizer.decode(chosen)
    special = any(token < len(SPECIAL) for token in chosen)
    return text if not special and lm.tokenizer.encode(context + text, add_special_tokens=False) == ids + chosen else None


def sentence(generator, least, most):
    return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))


def last_word(lm, generator, greedy, long):
    last = None
    while last is None:
        context = sentence(generator, 2, 40 if long else 9)
        last = continuation(lm, context, generator.randint(1, 3)) if greedy else " " + sentence(generator, 1, 2)
    return {"context": context, "continuation": last}


def part_of_character(lm, generator):
    """Continued by "é" or its like where the greedy tokens are others, but read "�" too."""
    parts = range(len(SPECIAL), len(SPECIAL) + len(BYTES))
    while True:
        context = sentence(generator, 2, 9)
        for last in "éèê":
            ids = lm.tokenizer.encode(context + last, add_special_tokens=False)
            greedy = lm.model(torch.tensor([ids])).logits[0, -3:-1].argmax(-1).tolist()
            if greedy != ids[-2:] and all(token in parts for token in greedy):
                return {"context": context, "continuation": last}


def near_tie(lm, generator):
    """Two items: a context with the likeliest token, and with the one that nearly is."""
    while True:
        ids = lm.tokenizer.encode(sentence(generator, 12, 12), add_special_tokens=False)[:MAX_LENGTH]
        ranked = lm.model(torch.tensor([ids])).logits[0].topk(2, -1)
        for place, margin in enumerate((ranked.values[:, 0] - ranked.values[:, 1]).tolist()):
            context, tokens = lm.tokenizer.decode(ids[: place + 1]), ranked.indices[place].tolist()
            texts = [lm.tokenizer.decode(token) for token in tokens]
            same = [
                lm.tokenizer.encode(context + text, add_special_tokens=False) == ids[: place + 1] + [token]
                for token, text in zip(tokens, texts)
            ]
            if NEAR_TIE[0] < margin < NEAR_TIE[1] and all(same) and min(tokens) >= len(SPECIAL):
                return [{"context": context, "continuation": text} for text in texts]


def answer(lm, generator, right):
    text = None
    while text is None:
        question = sentence(generator, 2, 6)
        text = continuation(lm, question, MAX_GEN_TOKS)
    for end in UNTIL:
        text = text.split(end)[0]
    return {"question": question, "answer": text if right else sentence(generator, 1, 2)}


def choice(generator, long):
    choices = [" " + sentence(generator, 1, 3) for _ in range(generator.randint(2, 5))]
    query = sentence(generator, 3, 40 if long else 9)
    return {"query": query, "choices": choices, "gold": generator.randrange(len(choices))}


def write_items(lm, seed):
    """Some are longer than the model takes at once; every third last word and every other answer is the model's own."""
    generator = random.Random(seed)
    tasks = {
        "choices": [choice(generator, i % 6 == 0) for i in range(24)],
        "last_words": [last_word(lm, generator, i % 3 == 0, i % 4 == 0) for i in range(24)]
        + [part_of_character(lm, generator) for _ in range(2)]
        + near_tie(lm, generator)
        + near_tie(lm, generator),
        "texts": [{"text": sentence(generator, words, words)} for words in (1, 3, 12, 20, 40, 90)],
        "answers": [answer(lm, generator, i % 2 == 0) for i in range(8)],
    }
    for name, items in tasks.items():
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (FOLDER / "tasks" / f"{name}.jsonl").write_text("".join(lines))


def evaluate(lm, names, chat):
    """Of each task its metrics, and of each item what the model answered, as lm-eval notes it."""
    tasks = TaskManager(include_path="tasks", include_defaults=False)
    results = lm_eval.simple_evaluate(lm, tasks=names, task_manager=tasks, bootstrap_iters=0, apply_chat_template=chat)
    metrics, samples = results["results"], results["samples"]
    return {
        task: {
            "metrics": {name: value for name, value in metrics[task].items() if is_metric(name)},
            "items": [sample["resps"] for sample in sorted(samples[task], key=lambda sample: sample["doc_id"])],
        }
        for task in names
    }


def is_metric(name):
    return name.endswith(",none") and "stderr" not in name


def main():
    torch.set_num_threads(1)
    os.chdir(FOLDER)  # the tasks name their items from here
    save_tokenizer(FOLDER)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for file in [*MODEL.glob("model*"), MODEL / "config.json", *FOLDER.glob("tokenizer*")]:
            shutil.copy(file, folder)
        lm = HFLM(folder, dtype="float32", max_length=MAX_LENGTH, device="cpu", batch_size=1)
        margins = Margins(lm.model)
        for seed in itertools.count(1):
            write_items(lm, seed)
            margins.least = float("inf")
            expected = {"completions": evaluate(lm, TASKS, False), "chat": evaluate(lm, TASKS[-1:], True)}
            print(f"seed {seed}: least margin {margins.least:.1e}")
            if margins.least > LEAST_MARGIN:
                break
    versions = {library.__name__: library.__version__ for library in (torch, transformers, lm_eval)}
    lines = ",\n".join(f"{json.dumps(way)}: {json.dumps(results)}" for way, results in expected.items())
    (FOLDER / "expected.json").write_text(f'{{"versions": {json.dumps(versions)},\n{lines}}}\n')
    for way, results in expected.items():
        print(way, {task: result["metrics"] for task, result in results.items()})


if __name__ == "__main__":
    main()
