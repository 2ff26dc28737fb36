"""What takes loss, for every template at hand and every kind of conversation, held to an oracle of its own.

The oracle knows nothing of how turns are found: it renders with transformers, with and without a turn. What the text
grows by behind the begin of an answer is what a generator would have to say.
"""

import json
import re
from collections import Counter
from itertools import product

import pytest

from ringbpt.config import UserError
from ringbpt.data.text.chat import ChatTemplate
from ringbpt.data.text.shapes import check_messages, trained
from tests.data.test_chat import NAMES, templates, theirs

__all__ = ["theirs"]  # the fixture

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "getweather",
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
WORD = re.compile(r"[a-z]+[0-9]zz")
IMEND = "<|im_start|>{{ m.role }}\n{{ m.content }}CALLS<|im_end|>\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}"
)
LOOP = "{% for t in tools or [] %}TOOL {{ t | tojson }}\n{% endfor %}{% for m in messages %}"
THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
# Kinds that the files don't have, written from what is documented of the families.
WRITTEN = {
    "ignores the begin of an answer": LOOP + IMEND,
    "grows": LOOP + IMEND + BEGIN,
    "a think block on the last turn alone": LOOP
    + IMEND.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n{% endif %}"
        "{{ m.content }}",
    )
    + BEGIN,
    "opens <think>": LOOP + IMEND.replace("{{ m.content }}", THOUGHT + "{{ m.content }}") + BEGIN.replace(
        "assistant\n", "assistant\n<think>\n"
    ),
    "counts its messages": "{% for i in range(messages | length) %}{% set m = messages[i] %}" + IMEND + BEGIN,
    "counts its messages, marked": "{% for i in range(messages | length) %}{% set m = messages[i] %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}CALLS<|end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "ends a turn where the next begins": LOOP.replace("TOOL", "<tool>")
    + "{% if not loop.first %}<|end|>{% endif %}<|{{ m.role }}|>{{ m.content }}CALLS{% endfor %}"
    + "{% if add_generation_prompt %}<|end|><|assistant|>{% else %}<|end|>{% endif %}",
    "Mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and tools %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}"
    "[TOOL_CALLS] CALLS{{ eos_token }}{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "Llama 2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'tool' %}{{ bos_token }}[INST] result: {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}CALLS {{ eos_token }}{% endif %}{% endfor %}",
    "SmolLM3": "<|im_start|>system\n{% for t in tools or [] %}{{ t | string }}\n{% endfor %}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{{ m.content }}CALLS<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + BEGIN,
    "drops all thoughts but of the last question": "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "<|{{ m.role }}|>{% if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}CALLS{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}  # fmt: skip


def every_template() -> dict[str, str]:
    found = {path.stem: path.read_text() for path in templates()}
    return found | {name: text.replace("CALLS", CALLS, 1) for name, text in WRITTEN.items()}


def conversation(questions: int, tools: bool, reasoning: bool) -> list[dict]:
    """Every word of it that matters stands in it once."""
    messages = []
    for n in range(questions):
        messages.append({"role": "user", "content": f"ask{n}zz please"})
        if tools:
            call = {"id": f"abc12345{n}", "type": "function"}
            call["function"] = {"name": "getweather", "arguments": {"city": f"oslo{n}zz"}}
            thought = {"reasoning_content": f"plan{n}zz hm"} if reasoning else {}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call], **thought})
            answer = {"role": "tool", "name": "getweather", "tool_call_id": call["id"]}
            messages.append(answer | {"content": f"rain{n}zz"})
        thought = {"reasoning_content": f"ponder{n}zz hm"} if reasoning else {}
        messages.append({"role": "assistant", "content": f"reply{n}zz done", **thought})
    return messages


def words(values) -> list[str]:
    """Of messages, or of texts."""
    return WORD.findall(" ".join(value if isinstance(value, str) else json.dumps(value) for value in values))


def shown(learnt) -> str:
    """A text with [[ ]] around what takes loss."""
    text, spans = learnt
    for begin, end in reversed(spans):
        text = f"{text[:begin]}[[{text[begin:end]}]]{text[end:]}"
    return text


def check(template: ChatTemplate, messages: list[dict], tools, theirs) -> str:
    """Empty where everything that a model would have to say takes loss, once, and nothing else; else what is wrong."""
    numbers = trained(messages, ("assistant",), "row 1")
    learnt = template.learnt(check_messages(messages, "messages", "row 1"), numbers, tools, "row 1")
    taken = template._as_taken(check_messages(messages, "messages", "row 1"), tools, "row 1")

    def render(end: int, prompt: bool = False) -> str | None:
        try:
            given = {"tools": tools, "chat_template": template.source, "add_generation_prompt": prompt}
            return theirs([taken[:end]], **given, **NAMES)[0][0]
        except Exception:  # the template's own: no conversation ends here
            return None

    whole = [render(end) for end in range(1, len(messages) + 1)]
    said = [text[begin:end] for text, spans in learnt for begin, end in spans]
    got = Counter(words(said))
    mine = set(words(messages[number] for number in numbers)) & set(words(filter(None, whole)))
    if set(got) != mine:
        return f"{sorted(set(got) ^ mine)} is learnt and should not be, or the other way round"
    if max(got.values()) > 1:
        return f"learnt twice: {got}"
    if strange := [text for text, _ in learnt if text not in whole]:
        return f"no text of the conversation's: {strange[0]!r}"
    for number in () if template.marked else numbers:
        prompt, before, after = render(number, True), render(number), render(number + 1)
        if not (prompt and after and after.startswith(prompt) and prompt != before):
            continue
        where = [(text, spans) for text, spans in learnt if text == after]
        if where and after[len(prompt) :].rstrip() not in [text[b:e] for text, spans in where for b, e in spans]:
            return f"turn {number}: {after[len(prompt) :]!r} is to be said"
    return ""


def test_everything_that_a_model_would_say_takes_loss_and_nothing_else(theirs):
    wrong, tried, refused = [], Counter(), Counter()
    found = {name: ChatTemplate(source, NAMES, "x") for name, source in every_template().items()}
    for (name, template), questions, tools, reasoning in product(
        found.items(), (1, 2, 3), (False, True), (False, True)
    ):
        messages = conversation(questions, tools, reasoning)
        try:
            problem = check(template, messages, TOOLS if tools else None, theirs)
        except UserError as error:
            known = ("roles must alternate", "roles are supported", "writes nothing of the call of 'getweather'")
            problem = "" if any(why in str(error) for why in known) and tools else str(error)
            refused[name] += 1
        tried[name] += 1
        if problem:
            wrong.append(f"{name}, {questions} questions, tools {tools}, reasoning {reasoning}: {problem}")
    assert not wrong, "\n".join(wrong)
    assert len(tried) == 72 + len(WRITTEN) and sum(refused.values()) < 0.2 * sum(tried.values())


U = lambda text: {"role": "user", "content": text}
A = lambda text, **more: {"role": "assistant", "content": text, **more}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
T = {"role": "tool", "content": "7"}
GROWS, LAST, IGNORES = (
    WRITTEN[name].replace("CALLS", CALLS)
    for name in ("grows", "a think block on the last turn alone", "ignores the begin of an answer")
)
LEARNT = {
    "a call, where only the last turn thinks": (LAST, [U("q"), A("", tool_calls=CALL), T, A("a")], {},
        ['<call>f {"x": 1}</call><|im_end|>', "<think>\n\n</think>\na<|im_end|>"]),
    "roles": (GROWS, [U("q"), A("", tool_calls=CALL), T, A("a")], {"roles": ("assistant", "tool")},
        ['<call>f {"x": 1}</call><|im_end|>', "7<|im_end|>", "a<|im_end|>"]),
    "no begin of an answer": (IGNORES, [U("q"), A("", tool_calls=CALL), T, A("a")], {},
        ['<call>f {"x": 1}</call><|im_end|>', "a<|im_end|>"]),
    "thought once": (LAST, [U("q"), A("a", reasoning_content="r")], {}, ["<think>\nr\n</think>\na<|im_end|>"]),
    "thought twice": (LAST, [U("p"), A("b", reasoning_content="s"), U("q"), A("a", reasoning_content="r")], {},
        ["<think>\ns\n</think>\nb<|im_end|>", "<think>\nr\n</think>\na<|im_end|>"]),
    "weights": (GROWS, [U("q"), A("bad", weight=0), U("q"), A("good", weight=1)], {}, ["good<|im_end|>"]),
    "train": (GROWS, [U("q"), A("bad", train=False), U("q"), A("good", train=True)], {}, ["good<|im_end|>"]),
    "parts": (GROWS, [U([{"type": "text", "text": "q"}]), A([{"type": "text", "text": word} for word in "ab"])], {},
        ["ab<|im_end|>"]),
    "settings": ("{% if not enable_thinking | default(true) %}NO {% endif %}" + GROWS, [U("q"), A("a")],
        {"settings": {"enable_thinking": False}}, ["a<|im_end|>"]),
    "reasoning by another name": (LAST, [U("q"), A("a", thinking="r")], {}, ["<think>\nr\n</think>\na<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEARNT)
def test_samples(case):
    source, messages, more, expected = LEARNT[case]
    messages = check_messages(messages, "messages", "row 1")
    numbers = trained(messages, more.get("roles", ("assistant",)), "row 1")
    found = ChatTemplate(source, NAMES, "x").learnt(messages, numbers, None, "row 1", more.get("settings"))
    assert [text[begin:end] for text, spans in found for begin, end in spans] == expected, list(map(shown, found))
    assert (found[0].text[:3] == "NO ") == (case == "settings")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"weight": 0.5}, "row 1: message 1 has weight 0.5: a turn takes loss (1) or none (0)"),
        ({"train": "no"}, "row 1: message 1 has train 'no': it must be true or false"),
    ],
)
def test_what_no_turn_can_be(message, said):
    with pytest.raises(UserError) as caught:
        trained([U("q"), A("a", **message)], ("assistant",), "row 1")
    assert str(caught.value) == said


def test_a_part_that_a_template_for_text_cannot_write_is_refused():
    parts = [{"type": "image", "url": "x"}]
    with pytest.raises(UserError, match="row 1: message 0 has a part of type 'image', and the chat template takes"):
        ChatTemplate(GROWS, NAMES, "x").learnt([U(parts), A("a")], [1], None, "row 1")


def test_a_call_that_the_template_does_not_write_is_refused():
    plain = WRITTEN["grows"].replace("CALLS", "")
    with pytest.raises(UserError, match="row 1: the chat template writes nothing of the call of 'f'"):
        ChatTemplate(plain, NAMES, "x").learnt([U("q"), A("", tool_calls=CALL)], [1], None, "row 1")
