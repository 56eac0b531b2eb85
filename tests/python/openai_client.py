"""Checks that the official openai client works against a running cadre: python openai_client.py http://host:port MODEL"""

import asyncio
import json
import sys
import urllib.request

import openai
from openai import AsyncOpenAI, OpenAI

BASE, MODEL = sys.argv[1] + "/v1", sys.argv[2]
client = OpenAI(base_url=BASE, api_key="not needed", max_retries=0, timeout=60)
QUESTION = [{"role": "user", "content": "Where does Tom live?"}]
LONG = {"extra_body": {"ignore_eos": True}, "max_tokens": 40}
CHECKS = []


def tokens(text):
    body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
    request = urllib.request.Request(sys.argv[1] + "/tokenize", body, {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


# Letters at random: a model that is sure of its answer would always give the same one.
LETTERS = {"temperature": 2, "extra_body": {"ignore_eos": True, "allowed_token_ids": tokens("a b c d e f g h i j k l m")}}


def check(function):
    CHECKS.append(function)
    return function


def ask(**more):
    return client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **LONG, **more})


@check
def models():
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "cadre"


@check
def chat():
    answer = ask()
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 40 and usage.total_tokens == usage.prompt_tokens + 40
    assert usage.prompt_tokens_details.cached_tokens >= 0


@check
def chat_streamed():
    whole = ask().choices[0].message.content
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, "length"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole
    assert len({chunk.id for chunk in chunks}) == 1


@check
def chat_streamed_with_the_clients_own_accumulator():
    # It refuses what was cut off by its length.
    word = ask().choices[0].message.content[8:11]
    more = {**LONG, "logprobs": True, "stop": word}
    whole = ask(**more).choices[0]
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, **more) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(deltas) == final.message.content == whole.message.content
    assert final.finish_reason == whole.finish_reason == "stop"
    assert len(final.logprobs.content) == len(whole.logprobs.content) > 0


@check
def stream_left_early():
    with ask(stream=True, max_tokens=500) as stream:
        for _, chunk in zip(range(3), stream):
            assert chunk.choices[0].finish_reason is None
    assert ask(max_tokens=1).choices[0].finish_reason == "length"


@check
def logprobs():
    content = ask(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 40
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3 and token.bytes is not None
        assert token.top_logprobs[0].token == token.token


@check
def several_choices():
    choices = ask(n=3, seed=1, **LETTERS).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert len({choice.message.content for choice in choices}) == 3


@check
def stop():
    whole = ask().choices[0].message.content
    word = whole[5:8]
    choice = ask(stop=[word, "never said"]).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == whole[: whole.index(word)]


@check
def seed():
    say = lambda seed: ask(seed=seed, **LETTERS).choices[0].message.content  # noqa: E731
    assert say(5) == say(5) != say(6)


@check
def parameters_of_vllm():
    body = {"ignore_eos": True, "top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "return_token_ids": True}
    choice = ask(temperature=1, extra_body=body).choices[0]
    assert len(choice.token_ids) == 40


@check
def completions():
    create = client.completions.create
    answer = create(model=MODEL, prompt="The garden is", **LONG)
    assert answer.object == "text_completion" and answer.choices[0].finish_reason == "length"
    text = answer.choices[0].text
    pieces = list(create(model=MODEL, prompt="The garden is", stream=True, **LONG))
    assert "".join(piece.choices[0].text for piece in pieces) == text
    several = create(model=MODEL, prompt=["The garden is", "Hello"], **LONG)
    assert [choice.index for choice in several.choices] == [0, 1] and several.choices[0].text == text
    tokens = create(model=MODEL, prompt=[9, 10, 11], echo=True, logprobs=2, max_tokens=0).choices[0].logprobs
    assert tokens.token_logprobs[0] is None and len(tokens.token_logprobs) == 3 == len(tokens.text_offset)


def fails_with(kind, call, **expected):
    try:
        call()
    except openai.APIStatusError as error:
        assert type(error) is kind, repr(error)
        for name, value in expected.items():
            assert getattr(error, name) == value, (name, getattr(error, name), value)
        return error
    raise AssertionError(f"no {kind.__name__}")


@check
def errors_become_the_clients_classes():
    bad = openai.BadRequestError
    error = fails_with(bad, lambda: ask(temperature=3), param="temperature", type="invalid_request_error", status_code=400)
    assert "temperature must be in [0, 2], got 3" in error.message
    fails_with(bad, lambda: ask(max_tokens=100_000), code="context_length_exceeded")
    fails_with(bad, lambda: ask(stream=True, extra_body={"tools": [{"type": "function"}]}), param="tools")
    missing = openai.NotFoundError
    fails_with(missing, lambda: ask(model="nobody"), param="model", code="model_not_found", status_code=404)
    fails_with(missing, lambda: client.models.retrieve("nobody"), code="model_not_found")
    fails_with(missing, lambda: client.embeddings.create(model=MODEL, input="x"), code="unknown_url")


@check
def many_at_once():
    async def all_of_them():
        async with AsyncOpenAI(base_url=BASE, api_key="not needed", max_retries=0) as client:

            async def one(seed):
                stream = await client.chat.completions.create(
                    model=MODEL, messages=QUESTION, stream=True, temperature=1.2, seed=seed, **LONG
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(seed % 4) for seed in range(16)))

    texts = asyncio.run(all_of_them())
    alone = [ask(temperature=1.2, seed=seed).choices[0].message.content for seed in range(4)]
    assert texts == alone * 4


for function in CHECKS:
    function()
    print(function.__name__)
print(f"{len(CHECKS)} checks passed")
