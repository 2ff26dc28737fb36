"""Tools and their calls as objects or JSON text, from JSON lines, Parquet or Arrow: the same rows, the same tokens."""

import copy
import json

import pytest

from ringbpt.config import TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.text.chat import ChatTemplate
from ringbpt.data.text.shapes import settings_of, tools_of
from ringbpt.data.text.text_processor import TextProcessor
from ringbpt.data.text.tokenizers import BytesTokenizer
from ringbpt.generation.text import make_chat_encoder
from tests.data.test_chat import NAMES
from tests.data.test_chat_kinds import CALLS, WRITTEN, A, U
from tests.data.test_formats import source

TEMPLATE = WRITTEN["grows"].replace("CALLS", CALLS)
TOKENIZER = BytesTokenizer(TokenizerConfig("bytes"))


def tool(**properties) -> list[dict]:
    """A tool whose properties no other row's tool has."""
    parameters = {"type": "object", "properties": {name: {"type": kind} for name, kind in properties.items()}}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def called(**arguments) -> list[dict]:
    return [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


TOOLS = [tool(city="string"), tool(a="number", b="string"), None]
ASKED = [
    [U("w?"), A(None, tool_calls=called(city="Oslo"))],
    [U("s?"), A("", tool_calls=called(a=1, b="x"))],
    [U("hello"), A("hi")],
]
ANSWER = [{"role": "tool", "content": "7"}, A("done")]
SPEAKERS = {"user": "human", "assistant": "gpt"}
# Rows of every shape that has tools: those of other rows fill a table's up with nulls.
SHAPES = {
    "messages": [{"messages": [*asked, *ANSWER], "tools": tools} for asked, tools in zip(ASKED, TOOLS, strict=True)],
    "prompt_completion": [
        {"prompt": asked[:1], "completion": [*asked[1:], *ANSWER], "tools": tools}
        for asked, tools in zip(ASKED, TOOLS, strict=True)
    ],
    "preference": [
        {"prompt": asked[:1], "chosen": asked[1:], "rejected": [A("no")], "tools": tools}
        for asked, tools in zip(ASKED, TOOLS, strict=True)
    ],
    "kto": [
        {"prompt": asked[:1], "completion": asked[1:], "label": True, "tools": tools}
        for asked, tools in zip(ASKED, TOOLS, strict=True)
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "w?"},
                {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"city": "Oslo"}})},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "done"},
            ],
            "tools": json.dumps(tools) if tools else None,
        }
        for tools in TOOLS
    ],
}


def documents(shape: str, rows) -> list[tuple[bytes, bytes]]:
    processor = TextProcessor(TextProcessorConfig(chat_template=TEMPLATE), TOKENIZER, "train_dataset", shape)
    found = [document for number, row in enumerate(rows) for document in processor.documents(row, f"row {number}")]
    return [(document.token.tobytes(), document.mask.tobytes()) for document in found]


def as_text(rows: list[dict], whole: bool) -> list[dict]:
    """The same rows with tools and arguments (or the lists of both, whole) as JSON text."""
    rows = copy.deepcopy(rows)
    for row in rows:
        if row.get("tools") and not isinstance(row["tools"], str):
            row["tools"] = json.dumps(row["tools"]) if whole else [json.dumps(tool) for tool in row["tools"]]
        for value in row.values():
            for message in value if isinstance(value, list) else []:
                if not isinstance(message, dict) or not message.get("tool_calls"):
                    continue
                for call in message["tool_calls"]:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
                if whole:
                    message["tool_calls"] = json.dumps(message["tool_calls"])
    return rows


@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_gives_the_same_tokens(shape, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = SHAPES[shape]
    want = documents(shape, rows)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_text(rows, True)))
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_text(rows, False)))
    for name in ("a.parquet", "b.arrow", "c.jsonl", "d.jsonl", "e.jsonl"):
        read = source(tmp_path, tmp_path / name)
        assert documents(shape, [read[number] for number in range(len(read))]) == want, name
    text = TOKENIZER.decode(list(b"".join(token for token, _ in want)[::4]))
    assert "null" not in text and "None" not in text and '"city": "Oslo"' in text and 'TOOL "' not in text


def test_generation_renders_what_training_renders():
    tokenizer = BytesTokenizer(TokenizerConfig("bytes"))
    tokenizer.chat_template = TEMPLATE
    encode, row = make_chat_encoder(tokenizer), SHAPES["messages"][0]
    for given in (row, as_text([row], True)[0]):
        prompt = tokenizer.decode(encode(given["messages"][:3], tools_of(given, "w"), "w", settings_of(given, "w")))
        (learnt,) = ChatTemplate(TEMPLATE, NAMES, "x").learnt(
            [m | {"content": m["content"] or ""} for m in row["messages"]], [3], row["tools"], "w"
        )
        assert learnt.text[: learnt.spans[0][0]] == prompt and prompt.startswith("TOOL {")


def test_settings_of_a_row_and_of_a_flag(tmp_path):
    template = "{% if not enable_thinking | default(true) %}NO {% endif %}" + TEMPLATE
    config = TextProcessorConfig(chat_template=template, chat_template_kwargs="dict(enable_thinking=False)")

    def text(config, **row) -> str:
        processor = TextProcessor(config, TOKENIZER, "train_dataset", "messages")
        return TOKENIZER.decode(processor({"messages": [U("q"), A("a")], **row}, "row 1").token)

    assert text(config).startswith("NO ") and not text(TextProcessorConfig(chat_template=template)).startswith("NO ")
    assert not text(config, chat_template_kwargs={"enable_thinking": True}).startswith("NO ")  # the row's goes before
    plain = TextProcessorConfig(chat_template=template)
    assert text(plain, chat_template_kwargs='{"enable_thinking": false}').startswith("NO ")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tools": "no"}, "row 1: field 'tools' is text that is no JSON: 'no'"),
        ({"tools": 3}, "row 1: field 'tools' is a number; it must be a list of tools"),
        ({"tools": ["3"]}, "row 1: a tool is a number; it must be an object"),
        ({"chat_template_kwargs": "[]"}, "row 1: field 'chat_template_kwargs' is an array; it must be an object"),
        (
            {"messages": [U("q"), A("", tool_calls=[{"function": {"name": "f", "arguments": "x="}}])]},
            "row 1: message 1 of 'messages': the arguments of 'f' is text that is no JSON: 'x='",
        ),
        (
            {"messages": [U("q"), A("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])]},
            "row 1: message 1 of 'messages': the arguments of 'f' are an array; they must be an object",
        ),
        ({"messages": [U("q"), A("", tool_calls=[{}])]}, "row 1: message 1 of 'messages': a tool call without a name"),
    ],
)
def test_what_is_no_tool_data(row, said):
    with pytest.raises(UserError) as caught:
        documents("messages", [good := {"messages": [U("q"), A("a")]}, good | row])
    assert str(caught.value) == said


def test_a_function_call_that_is_no_json_is_refused():
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]
    with pytest.raises(UserError, match=r"row 0: turn 1 of 'conversations', a function_call, is text that is no JSON"):
        documents("sharegpt", [{"conversations": turns}])
