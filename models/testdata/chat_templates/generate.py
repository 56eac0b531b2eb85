"""Writes expected.json: what transformers renders of the templates beside it. Run with transformers and jinja2 at hand."""

import json
import pathlib

from transformers.utils.chat_template_utils import (
    _normalize_chat_messages,
    render_jinja_template,
)

HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place: \"now\" or later, in °C & <units>.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "enum": ["Paris", "北京"]},
                "days": {"type": "integer", "default": 1, "minimum": 0.5},
            },
            "required": ["place"],
        },
    },
}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, identifier="abcdefghi"):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "one question": [message("user", "What is 2+2?")],
    "system": [message("system", "Be brief.\nAlways."), message("user", "Grüße, \"Welt\" <b>&</b> 😀")],
    "several turns": [
        message("system", "You help."),
        message("user", "One?"),
        message("assistant", "<think>\nhm\n</think>\n\nOne."),
        message("user", "  Two?  "),
        message("assistant", " Two. ", reasoning="Easy."),
        message("user", "Three?\n"),
    ],
    "answer last": [message("user", "Tell a story"), message("assistant", "Once upon a time  ")],
    "tools": [
        message("user", "Weather?"),
        message("assistant", None, tool_calls=[call("get_weather", {"place": "北京", "days": 2})]),
        message("tool", '{"t": 20}', name="get_weather", tool_call_id="abcdefghi"),
        message("tool", "21", name="get_weather"),
        message("assistant", "Warm."),
        message("user", "Thanks"),
    ],
    "two users": [message("user", "a"), message("user", "b")],
    "unknown role": [message("user", "a"), message("robot", "b")],
    "blocks": [
        message("user", [{"type": "text", "text": "first"}, {"type": "image"}, {"type": "text", "text": "second"}]),
        message("skip", "x"),
        message("assistant", "line\nline"),
        message("stop", "y"),
        message("user", "never"),
    ],
    "text blocks last": [
        message("user", "go"),
        message("assistant", [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]),
    ],
}

CASES = []
for template in ["ling", "qwen3", "olmoe", "strict", "features"]:
    for conversation in CONVERSATIONS:
        for options in [
            {},
            {"add_generation_prompt": True},
            {"add_generation_prompt": True, "tools": [WEATHER]},
            {"add_generation_prompt": True, "kwargs": {"enable_thinking": False, "custom": {"nested": {"deep": [1, None]}}}},
            {"continue_final_message": True},
        ]:
            CASES.append((template, conversation, options))


def render(template, messages, options):
    source = (HERE / f"{template}.jinja").read_text()
    rendered, _ = render_jinja_template(
        conversations=[_normalize_chat_messages(messages)],
        tools=options.get("tools"),
        chat_template=source,
        add_generation_prompt=options.get("add_generation_prompt", False),
        continue_final_message=options.get("continue_final_message", False),
        **{**TOKENS, **options.get("kwargs", {})},
    )
    return rendered[0]


def main():
    cases = []
    for template, conversation, options in CASES:
        case = {"template": template, "conversation": conversation, "options": options}
        try:
            case["expected"] = render(template, CONVERSATIONS[conversation], options)
        except Exception as error:
            case["error"] = f"{type(error).__name__}: {error}"[:120]
        cases.append(case)
    content = {"tokens": TOKENS, "conversations": CONVERSATIONS, "cases": cases}
    (HERE / "expected.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


main()
