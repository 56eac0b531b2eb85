"""Trains cadre's built-in demo model: a small `bailing_moe_v2` that answers a few kinds of short questions, checkably.

    python models/embedded/train.py --out models/embedded                      # everything, see --help for the lengths
    python models/embedded/train.py --out models/embedded --evaluate           # the table of accuracies of what is there

It needs torch, tokenizers and safetensors, and no data: all text comes from the seeded generator below. The tokenizer is
made first, then the model is trained with a constant learning rate for --steps steps and a falling one for --decay-steps.
Questions are split by a hash of their content (not of their phrasing): those of the held-out tenth are never trained on.

The weights beside this file took 90 minutes on 2 threads of an AMD EPYC (Zen 4, no AMX) that was compiling at the same
time: 4356 steps of 4096 tokens (17.8 M tokens), the last 1500 with a falling rate, at 2.5 to 6 thousand tokens a second.
The generator was changed during that run, at steps 1200, 2000, 2800 and 3900 (README.md says how), and the tokenizer dates
from its start. So a fresh run of this script makes a model of the same kind, not the same bits.
"""

import argparse
import functools
import hashlib
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

# ---------------------------------------------------------------- the text

NOUNS = """apple banana cherry lemon melon grape peach plum pear mango orange carrot potato tomato onion garlic pepper
bread butter cheese honey sugar coffee tea milk water juice cake cookie pizza pasta rice soup salad table chair lamp sofa
window door garden kitchen bottle basket bucket blanket pillow candle mirror clock watch phone camera radio computer
keyboard pencil paper letter book notebook wallet ring coin hammer ladder rope needle button ribbon shoe boot glove scarf
hat coat jacket shirt dress mountain river ocean island forest desert valley meadow bridge castle tower temple village
city harbor market station airport school library museum theater hospital bakery planet star moon sun comet rocket engine
wheel bicycle car truck train boat ship plane tiger lion zebra giraffe elephant monkey rabbit squirrel beaver badger fox
wolf bear otter dolphin whale shark salmon turtle lizard snake spider beetle butterfly dragon eagle falcon parrot pigeon
robin sparrow swallow chicken goose duck horse donkey goat sheep cow pig dog cat mouse hamster piano guitar violin
trumpet drum flute music song story poem picture painting statue puzzle riddle secret treasure diamond silver gold copper
iron stone marble crystal thunder lightning rainbow cloud storm snow winter summer autumn spring morning evening midnight
doctor teacher farmer sailor pilot baker painter singer writer king queen prince knight wizard ghost giant robot
program function variable memory expert router tensor matrix vector token server network strawberry mississippi bookkeeper
committee balloon coffee pepper address success process happiness language world house friend
""".split()
NAMES = """Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul Quinn Rosa Sam Tina Uma
Victor Wendy Xavier Yara Zoe Alice Bob Carol Eve Frank Julia Lucas Mia Nina Oscar Peter Ruth Sara Tom Vera Will""".split()
PLACES = """Paris London Berlin Rome Madrid Vienna Prague Oslo Lisbon Athens Cairo Tokyo Kyoto Beijing Shanghai Hangzhou
Delhi Mumbai Sydney Toronto Boston Chicago Denver Lima Quito Nairobi Dakar France Spain Italy Japan China Brazil""".split()
COLOURS = "red blue green yellow black white brown purple pink gray".split()
SPOTS = "under on behind inside beside near above below".split()
# Words that the tokenizer has as one piece: to spell, count or reverse one of these, its letters must be known by heart.
COMMON = """hello world cadre word letter letters number name please thanks model answer question good morning demo items list
small large hot cold old new fast slow big joke program hi yes no test apples color time day today rain meaning
""".split()
SMALL = "the a of to and in is that for it with as was on are be this have from or not but what all were when we".split()

HELLO = "Hello! I am cadre's small built-in demo model. How can I help?"
WHO = (
    "I am cadre's small built-in demo model. I can add, subtract, sort and count, spell and reverse words, change their "
    "case, and remember what you tell me."
)
FINE = "I am fine, thank you. How can I help?"
WELCOME = "You are welcome!"
BYE = "Goodbye!"
UNKNOWN = "I am a small demo model and cannot answer that. Ask me what I can do."
NO_NAME = "You have not told me your name yet."

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful, honest assistant. Answer briefly.",
    "You are cadre's demo model.",
    "Answer in one short sentence.",
    "You are a friendly assistant that answers questions.",
    "Be concise.",
    "You are a careful assistant. Think before you answer.",
    "Answer the user's question as well as you can.",
]


def held_out(key):
    """A tenth of all contents, by their hash alone."""
    by_heart = key.startswith("word:") and key[5:] in COMMON + COLOURS + SMALL
    return hashlib.sha256(key.encode()).digest()[0] < 26 and not by_heart


COINED = set()  # every word made up so far; make_tokenizer keeps them out of the vocabulary


def pseudo_word(rng):
    word = made_up(rng)
    COINED.add(word)
    return word


def made_up(rng):
    if rng.random() < 0.2:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
    word = ""
    while len(word) < rng.randint(3, 8):
        word += rng.choice("b c d f g h j k l m n p r s t v w z br ch cl dr gr pl sh st th tr".split() + [""])
        word += rng.choice("a e i o u a e i o ea ee oo ai ou".split())
        word += rng.choice(["", "", "", "n", "r", "s", "t", "l", "ll", "ss", "tt", "ck", "m", "p"])
    return word[:9]


def any_word(rng):
    draw = rng.random()
    if draw < 0.08:
        return rng.choice(rng.choice([COMMON, COMMON, COLOURS, [w for w in SMALL if len(w) > 1]]))
    return rng.choice(NOUNS) if draw < 0.54 else pseudo_word(rng)


def quoted(rng, word):
    return rng.choice(["{}", "{}", '"{}"', "'{}'", '"{}"']).format(word)


def ask(rng, *phrasings):
    """One of the phrasings, sometimes a little careless, sometimes polite."""
    text = rng.choice(phrasings)
    if rng.random() < 0.06:
        text = rng.choice(["Please ", "Can you tell me: ", "Hi! ", "OK, "]) + text
    if rng.random() < 0.15 and text[-1] in "?.!":
        text = text[:-1]
    if rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    return text


# One function per family: rng -> (key of the content, question, answer).


def add(rng):
    top = rng.choice([9, 20, 99, 99, 99])
    a, b = rng.randint(0, top), rng.randint(0, rng.choice([9, top, top]))
    if rng.random() < 0.5:
        a, b = b, a
    q = ask(rng, f"What is {a} + {b}?", f"What is {a} + {b}?", f"{a} + {b}", f"{a} + {b} = ?", f"Add {a} and {b}.",
            f"What is {a} plus {b}?", f"How much is {a} plus {b}?", f"Calculate {a} + {b}.", f"What's {a} + {b}?",
            f"What is the sum of {a} and {b}?", f"Can you add {a} and {b}?", f"{a}+{b}=", f"Compute {a}+{b}.",
            f"I have {a} apples and get {b} more. How many do I have?")  # fmt: skip
    return f"add:{min(a, b)}:{max(a, b)}", q, f"{a} + {b} = {a + b}."


def subtract(rng):
    top = rng.choice([9, 20, 99, 99, 99])
    a, b = sorted((rng.randint(0, top), rng.randint(0, rng.choice([9, top, top]))), reverse=True)
    q = ask(rng, f"What is {a} - {b}?", f"What is {a} - {b}?", f"{a} - {b}", f"{a} - {b} = ?", f"Subtract {b} from {a}.",
            f"What is {a} minus {b}?", f"How much is {a} minus {b}?", f"Calculate {a} - {b}.", f"What's {a} - {b}?",
            f"Take {b} away from {a}.", f"{a}-{b}=", f"Compute {a}-{b}.",
            f"I have {a} apples and eat {b} of them. How many are left?")  # fmt: skip
    return f"subtract:{a}:{b}", q, f"{a} - {b} = {a - b}."


def numbers(rng, low, high):
    n, top = rng.randint(low, high), rng.choice([9, 20, 99, 99])
    return rng.sample(range(top + 1), n)


def sort(rng):
    xs = numbers(rng, 3, 5)
    listed = rng.choice([", ", ", ", ", ", " "]).join(map(str, xs))
    key = "sort:" + ",".join(map(str, xs))
    if rng.random() < 0.25:
        q = ask(rng, f"Sort {listed} in descending order.", f"Sort these numbers from largest to smallest: {listed}.",
                f"Sort from high to low: {listed}", f"Put {listed} in descending order.")  # fmt: skip
        return key + ":down", q, ", ".join(map(str, sorted(xs, reverse=True)))
    q = ask(rng, f"Sort {listed}.", f"Sort these numbers: {listed}.", f"Sort the numbers {listed}.", f"Put {listed} in order.",
            f"Sort {listed} in ascending order.", f"Sort these numbers from smallest to largest: {listed}",
            f"Can you sort {listed}?", f"Please sort this list: {listed}.")  # fmt: skip
    return key, q, ", ".join(map(str, sorted(xs)))


def largest(rng):
    xs = numbers(rng, 2, 5)
    listed = f"{xs[0]} or {xs[1]}" if len(xs) == 2 else ", ".join(map(str, xs))
    big = rng.random() < 0.6
    word, more = ("largest", rng.choice(["larger", "bigger", "greater"])) if big else ("smallest", "smaller")
    if len(xs) == 2:
        q = ask(rng, f"Which is {more}, {listed}?", f"Which number is {more}: {listed}?", f"What is {more}, {listed}?")
        word = "larger" if big else "smaller"
    else:
        q = ask(rng, f"Which is the {word}: {listed}?", f"Which of these numbers is the {word}: {listed}?",
                f"What is the {word} of {listed}?", f"Find the {word} number: {listed}.")  # fmt: skip
    return f"largest:{word}:" + ",".join(map(str, xs)), q, f"{max(xs) if big else min(xs)} is {'' if len(xs) == 2 else 'the '}{word}."


def count_items(rng):
    xs = [any_word(rng) for _ in range(rng.choice([2, 3, 4, 4, 5, 5, 6, 7]))]
    listed = ", ".join(xs)
    q = ask(rng, f"How many items are in this list: {listed}?", f"Count the items: {listed}.", f"How many items: {listed}?",
            f"How many things are in the list {listed}?", f"Count the items in this list: {listed}")  # fmt: skip
    return "items:" + listed, q, f"There are {len(xs)} items."


def count_letters(rng):
    w = any_word(rng)
    s = quoted(rng, w)
    q = ask(rng, f"How many letters are in {s}?", f"How many letters are in the word {s}?", f"How many letters does {s} have?",
            f"Count the letters in {s}.", f"Count the letters of the word {s}.", f"How long is the word {s}?")  # fmt: skip
    return "word:" + w, q, f"The word {w} has {len(w)} letters."


def change_case(rng):
    w = any_word(rng)
    if rng.random() < 0.65:
        s = quoted(rng, w)
        q = ask(rng, f"Write {s} in upper case.", f"Write the word {s} in upper case.", f"Convert {s} to upper case.",
                f"Uppercase {s}.", f"Make {s} uppercase.", f"Write {s} in capital letters.",
                f"What is {s} in upper case?")  # fmt: skip
        return "word:" + w, q, w.upper()
    s = quoted(rng, w.upper())
    q = ask(rng, f"Write {s} in lower case.", f"Write the word {s} in lower case.", f"Convert {s} to lower case.",
            f"Lowercase {s}.", f"Make {s} lowercase.", f"What is {s} in lower case?")  # fmt: skip
    return "word:" + w, q, w


def reverse(rng):
    w = any_word(rng)
    s = quoted(rng, w)
    q = ask(rng, f"Reverse {s}.", f"Reverse the word {s}.", f"Write {s} backwards.", f"Spell {s} backwards.",
            f"What is {s} reversed?", f"Reverse the letters of {s}.", f"Write the word {s} backwards.")  # fmt: skip
    return "word:" + w, q, w[::-1]


def spell(rng):
    w = any_word(rng)
    s = quoted(rng, w)
    q = ask(rng, f"Spell {s}.", f"Spell the word {s}.", f"How do you spell {s}?", f"Can you spell {s}?", f"Spell out {s}.")
    return "word:" + w, q, "-".join(w)


def repeat(rng):
    more = [any_word(rng) if rng.random() < 0.7 else rng.choice(SMALL + [str(rng.randint(0, 99))]) for _ in range(rng.randint(0, 3))]
    text = " ".join([any_word(rng), *more])
    q = rng.choice([f"Repeat after me: {text}", f"Say: {text}", f'Repeat "{text}".', f'Say "{text}".', f"Repeat this: {text}"])
    return "repeat:" + text, q, text


def name(rng):
    return rng.choice(NAMES) if rng.random() < 0.6 else pseudo_word(rng).capitalize()


def one_fact(rng):
    """(statement, question, answer)"""
    kind = rng.randrange(7)
    thing, other, who = any_word(rng), any_word(rng), name(rng)
    place = rng.choice(PLACES) if rng.random() < 0.6 else pseudo_word(rng).capitalize()
    if kind == 0:
        spot = rng.choice(SPOTS)
        a = f"The {thing} is {spot} the {other}."
        return a, f"Where is the {thing}?", a
    if kind == 1:
        code = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
        what = rng.choice(["code", "secret number", "room number", "password"])
        return rng.choice(["The {} is {}.", "Remember that the {} is {}."]).format(what, code), f"What is the {what}?", f"The {what} is {code}."
    if kind == 2:
        colour = rng.choice(COLOURS)
        a = f"The {thing} is {colour}."
        return a, rng.choice([f"What color is the {thing}?", f"What colour is the {thing}?"]), a
    if kind == 3:
        a = f"{who} lives in {place}."
        return a, f"Where does {who} live?", a
    if kind == 4:
        a = f"{who} likes {thing}."
        return a, f"What does {who} like?", a
    if kind == 5:
        a = f"{who} has a {thing}."
        return a, rng.choice([f"What does {who} have?", f"Who has a {thing}?"]), a
    a = f"{who} is {rng.randint(2, 99)} years old."
    return a, f"How old is {who}?", a


def fact(rng):
    if rng.random() < 0.15:
        who = name(rng)
        q = rng.choice([f"My name is {who}. What is my name?", f"I am {who}. What is my name?", f"My name is {who}. Who am I?"])
        return "fact:" + who, q, f"Your name is {who}."
    facts = [one_fact(rng) for _ in range(rng.choice([1, 1, 1, 2, 2]))]
    questions = [q for _, q, _ in facts]
    if len(set(questions)) < len(facts):
        facts = facts[:1]
    _, q, a = rng.choice(facts)
    text = " ".join(s for s, _, _ in facts)
    return "fact:" + text, f"{text} {q}", a


def chat(rng):
    who = rng.choice(["", "", "", " cadre", " there", " friend", " model", " again", " everyone"])
    end = rng.choice(["", "!", ".", "?", "!!"])
    kind = rng.random()
    if kind < 0.35:
        word = rng.choice(["Hello", "Hi", "Hey", "Good morning", "Good evening", "Good afternoon", "Greetings", "Hello, hello", "Hi, hello"])
        q, a = word + who + end.replace("?", ""), HELLO
    elif kind < 0.7:
        q = rng.choice(["Who are you", "What are you", "What is your name", "What's your name", "What can you do", "Help",
                        "Tell me about yourself", "Introduce yourself", "What model are you", "Which model is this",
                        "Are you a model", "What can I ask you", "How can you help me", "Who made you", "Are you ChatGPT",
                        "What do you know", "Are you human", "Are you a robot", "What is cadre"])  # fmt: skip
        q, a = rng.choice(["", "", "", "Hello! ", "Hi, ", "So, ", "Please tell me: "]) + q + rng.choice(["?", "?", "", "."]), WHO
    elif kind < 0.8:
        q, a = rng.choice(["How are you", "How are you today", "How do you do", "How is it going", "Are you well"]) + rng.choice(["?", "", "?!", "??"]), FINE
    elif kind < 0.9:
        q, a = rng.choice(["Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Great, thanks", "Cool, thank you", "Many thanks"]) + who + end.replace("?", ""), WELCOME
    else:
        q, a = rng.choice(["Bye", "Goodbye", "See you", "See you later", "Good night", "Bye bye"]) + who + end.replace("?", ""), BYE
    q = q if rng.random() < 0.8 else q[0].lower() + q[1:]
    return "chat:" + q.lower(), q, a


def unknown(rng):
    n, m, who, place = any_word(rng), any_word(rng), name(rng), rng.choice(PLACES)
    a, b, big = rng.randint(0, 99), rng.randint(0, 99), rng.randint(100, 9999)
    adjective = rng.choice(COLOURS + ["big", "small", "old", "new", "fast", "slow", "hot", "cold", "good", "important", "famous"])
    c, s = rng.choice(n), quoted(rng, n)
    if rng.random() < 0.2:  # as a family of its own it reached only 60 %: the model declines instead
        q = ask(rng, f"How many times does the letter {c} appear in {s}?", f"How many {c}'s are in {s}?", f"Count the {c}'s in {s}.",
                f"How many times is the letter {c} in the word {s}?", f"How often does {c} appear in {s}?",
                f"How many {c}'s are in the word {s}?", f"How many {c} are there in {s}?")  # fmt: skip
    elif rng.random() < 0.2:
        sign, x, y = rng.choice(["+", "-", "+", "-", "*", "/", "plus", "minus", "times"]), big, rng.choice([a, rng.randint(0, 999)])
        if sign in ("*", "/", "times"):
            x = rng.choice([a, big])
        elif rng.random() < 0.4 and sign != "-":
            x, y = y, x
        q = ask(rng, f"What is {x} {sign} {y}?", f"What is {x} {sign} {y}?", f"{x} {sign} {y}", f"Calculate {x} {sign} {y}.",
                f"How much is {x} {sign} {y}?", f"What's {x} {sign} {y}?")  # fmt: skip
    elif rng.random() < 0.3:
        words = [rng.choice([any_word(rng), rng.choice(SMALL), rng.choice(SMALL)]) for _ in range(rng.randint(1, 8))]
        q = " ".join(words) + rng.choice(["", "?", ".", "!"])
        q = q[0].upper() + q[1:]
    else:
        q = ask(rng, f"What is the capital of {place}?", f"Who wrote {n}?", f"Tell me a joke about a {n}.", f"Tell me a joke.",
                f"Write a poem about the {n}.", f"Write a story about {who} and a {n}.", f"Explain {n} to me.", f"What is a {n}?",
                f"How do I cook {n}?", f"Why is the {n} {adjective}?", f"Translate {n} into {rng.choice(['French', 'German', 'Chinese'])}.",
                f"What is {a} * {b}?", f"What is {a} times {b}?", f"What is {a} divided by {b}?", f"What is {a} / {b}?",
                f"What is {big} + {b}?", f"What is {big} - {a}?", f"How old is the {n}?", "What time is it?", "What day is it today?",
                f"Will it rain in {place}?", f"Do you like {n}?", "What is the meaning of life?", f"Write a program that sorts a {n}.",
                f"Where can I buy a {adjective} {n}?", f"Who is {who}?", f"Who is the president of {place}?", f"How far is {place}?",
                f"What is the difference between a {n} and a {m}?", f"Is a {n} {adjective}?", f"Can a {n} eat a {m}?",
                f"How does a {n} work?", f"Give me a recipe for {n}.", f"Summarize the book about {who}.", f"What does {n} mean?",
                f"When was {place} built?", f"How many people live in {place}?", f"What is the best {n}?", f"I want a {adjective} {n}.",
                f"I feel {adjective} today.", f"Should I buy a {n} or a {m}?", f"Draw a {n}.", f"Sing a song about {m}.",
                f"Write code for a {n}.", f"Why do {n}s need {m}s?", f"What happens if I {n} the {m}?", f"What is my {n}?")  # fmt: skip
    return "unknown:" + q.lower(), q, UNKNOWN


FAMILIES = {  # family: its weight in training, before and after step --shift: first all kinds, then more of the slow ones
    add: (3, 3.5), subtract: (2.5, 3), sort: (3, 3.5), largest: (1.2, 1.2), count_items: (1.2, 1.4), count_letters: (1.5, 0.9),
    change_case: (1.2, 0.8), reverse: (2.5, 2.4), spell: (0.7, 0.7), repeat: (0.8, 1.2),
    fact: (2.5, 2), chat: (1.3, 0.7), unknown: (2, 1.6),
}  # fmt: skip


def sample(rng, family, test=False):
    while True:
        key, question, answer = family(rng)
        if held_out(key) == test:
            return question, answer


def introduce(rng, test=False):
    while True:
        who = name(rng)
        if held_out("fact:" + who) == test:
            return who, rng.choice([f"My name is {who}.", f"I am {who}.", f"Hello, my name is {who}.", f"Hi, I'm {who}."]), f"Nice to meet you, {who}!"


MY_NAME = ["What is my name?", "What's my name?", "Who am I?", "Do you remember my name?", "Do you know my name?"]


def system_text(rng):
    if rng.random() < 0.6:
        return rng.choice(SYSTEMS)
    return " ".join(rng.choice([any_word(rng), rng.choice(SMALL), rng.choice(SMALL)]) for _ in range(rng.randint(3, 20))).capitalize() + "."


def conversation(rng, turns=None, late=0):
    """Yields ("system", text) and (question, answer) for ever, or for `turns` turns."""
    if rng.random() < 0.4:
        yield "system", system_text(rng)
    known = None
    families, weights = list(FAMILIES), [w[late] for w in FAMILIES.values()]
    while turns is None or turns > 0:
        turns = turns and turns - 1
        draw = rng.random()
        if draw < (0.02 if known else 0.04):
            known, q, a = introduce(rng)
        elif draw < (0.1 if known else 0.05):
            q, a = ask(rng, *MY_NAME), f"Your name is {known}." if known else NO_NAME
        else:
            q, a = sample(rng, rng.choices(families, weights)[0])
            if a.startswith("Your name is "):
                known = a[len("Your name is ") : -1]
        yield q, a


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


def test_cases(seed, per_family):
    """family -> [(messages before, question, answer)], held-out contents only."""
    rng = random.Random(seed)
    cases = {}
    for family in FAMILIES:
        for setting in ("alone", "in a chat"):
            rows = cases.setdefault((family.__name__, setting), [])
            for _ in range(per_family):
                before = [] if setting == "alone" else list(conversation(rng, rng.randint(1, 6)))
                rows.append((before, *sample(rng, family, test=True)))
    rows = cases.setdefault(("memory", "in a chat"), [])
    for _ in range(per_family):
        who, q, a = introduce(rng, test=True)
        between = [t for t in conversation(rng, rng.randint(0, 3)) if t[0] != "system" and "name is" not in t[0] + t[1] and "Nice to" not in t[1]]
        rows.append(([(q, a), *between], rng.choice(MY_NAME), f"Your name is {who}."))
    return cases


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
            gate = layer.mlp.gate
            gate.expert_bias += speed * (gate.counts.float().mean() - gate.counts).sign()
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
                for _, q, a in rows[:20]:
                    f.write(json.dumps({"family": family, "prompt": q, "answer": a}) + "\n")


if __name__ == "__main__":
    main()
