"""Conversations, templates that write them in the ways that stock templates do, and what must hold of any mask.

Each turn says a word of its own (Q1, A1, R1 for thoughts, T1 for a tool), so that a mask can be judged by words alone.
"""

import re
from typing import Any

CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwei"}}}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "first"}}},
    },
}


def asked(said: str) -> dict[str, Any]:
    return {"role": "user", "content": said}


def told(said: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": said, **more}


SYSTEM = {"role": "system", "content": "S0"}
THOUGHTS = "<think>\nR{0}\n</think>\n\nA{0}"
AFTER_A_TOOL = [told("", tool_calls=CALLS), {"role": "tool", "name": "add", "content": "T1"}, told("A2")]

CHATS: dict[str, list[dict[str, Any]]] = {
    "single": [asked("Q1"), told("A1")],
    "several": [asked("Q1"), told("A1"), asked("Q2"), told("A2"), asked("Q3"), told("A3")],
    "system": [SYSTEM, asked("Q1"), told("A1"), asked("Q2"), told("A2")],
    "empty answer": [asked("Q1"), told(""), asked("Q2"), told("A2")],
    "two answers": [asked("Q1"), told("A1"), told("A2"), asked("Q3"), told("A3")],
    "tool call": [asked("Q1"), *AFTER_A_TOOL, asked("Q3"), told("A3")],
    "thoughts": [asked("Q1"), told(THOUGHTS.format(1)), asked("Q2"), told(THOUGHTS.format(2))],
    "thoughts apart": [
        asked("Q1"), told("A1", reasoning_content="R1"), asked("Q2"), told("A2", reasoning_content="R2"),
    ],
    "unicode": [
        asked(" \u00bfQ1 \U0001f642?"), told("\u4f60\u597d A1  "), asked("Q2\n"), told("\n\n na\u00efve A2 \n"),
    ],
    "repeats": [
        asked("A1"), told("A1"), asked("A1 A1"), told("A1"), asked("<b>"), told("<b>A1</b>"),
        asked("assistant"), told("assistant\n"),
    ],
    "ends with a question": [asked("Q1"), told("A1"), asked("Q2"), told("A2"), asked("Q3")],
}  # fmt: skip

_START, _END = "{{ '<|im_start|>' + m.role + '\\n' }}", "{{ '<|im_end|>\\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

EMPTY_THOUGHTS_LAST = (
    "{%- for m in messages %}" + _START + "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '\\n\\n' %}"
    "{{ '<think>' + thought + '</think>\\n\\n' }}{% endif %}{{ said }}" + _END + "{% endfor %}" + _PROMPT
)
END_OF_TEXT_LAST = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|im_start|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SYSTEM_IN_THE_LAST_QUESTION = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% set questions = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if system is defined and m is sameas(questions[-1]) %}"
    "{{ system + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ '[T]' + m.content }}{% endif %}"
    "{% endfor %}"
)
THOUGHTS_DROPPED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{{ m.content.split('</think>')[-1] | trim }}{{ '<|im_end|>' }}{% else %}" + _START + "{{ m.content | trim }}"
    "{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
CALLS_AS_JSON = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    + _END
    + "{% endif %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    + _START
    + "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% if loop.last %}{{ '\\n' }}{% endif %}{% endfor %}" + _PROMPT
)
HEADER_IN_THE_QUESTION = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}" + _START + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}" + _PROMPT
)

TEMPLATES = {
    "an empty think block in the last turn": EMPTY_THOUGHTS_LAST,
    "an end of text at the end": END_OF_TEXT_LAST,
    "the system turn in the last question": SYSTEM_IN_THE_LAST_QUESTION,
    "thoughts dropped": THOUGHTS_DROPPED,
    "tool calls": CALLS_AS_JSON,
    "the header in the question": HEADER_IN_THE_QUESTION,
    "marks of its own": MARKED,
}


def words(text: str) -> list[str]:
    return re.findall(r"[QART]\d", text)


def judge(text: str, pieces: list[str], chat: list[dict[str, Any]]) -> None:
    """Assert that the supervised pieces of text hold what the text has of the answers, in order, and nothing else."""
    answers = {word for turn in chat if turn["role"] == "assistant" for word in words(str(turn))}
    others = {word for turn in chat if turn["role"] != "assistant" for word in words(str(turn))}
    learned = [word for piece in pieces for word in words(piece)]
    if not answers & others:
        assert learned == [word for word in words(text) if word in answers]
    if not any(turn["content"] == "" for turn in chat):
        assert all(words(piece) or "assistant" in piece for piece in pieces)
    spoken = [turn for turn in chat if turn["role"] == "assistant" and words(turn["content"])]
    assert len([word for word in learned if word[0] == "A"]) == len(spoken)
