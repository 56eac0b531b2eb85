"""The text that the demo model learns: a seeded generator of short chats with checkable answers.

Questions are split by a hash of their content (not of their phrasing): those of the held-out tenth are never trained on.
"""

import hashlib
import random

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
        q = ask(rng, f"What is the capital of {place}?", f"Who wrote {n}?", f"Tell me a joke about a {n}.", "Tell me a joke.",
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
