"""Parts of answers, against what a reader of the whole text finds, however the text is cut into pieces."""

import json
import time
from random import Random
from typing import Any

import pytest

from autodeploy.server.answer_parts import CallArguments, CallStart, Part, Text, Thought
from autodeploy.server.answer_reader import AnswerPlan
from autodeploy.server.tool_calls import ToolFormat, tool_format

SECTIONS = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": 1}\n```<｜tool▁call▁end｜>\n"
    "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{\"b\": {}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)  # fmt: skip
TRICKY = {"a": '}<{"\\', "b": [1, {"c": "</tool_call>"}], "é": None}

Calls = list[tuple[str, Any]]

CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (
        "tags",
        f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {json.dumps(TRICKY)}}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"x":1}, "name": "g"}\n</tool_call>',
        "Let me see.",
        [("f", TRICKY), ("g", {"x": 1})],
    ),
    ("tags", '<tool_call>{"name": "f", "id": 12, "arguments": {}}</tool_call> done', " done", [("f", {})]),
    ("tags", '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    ("tags", "no <tool_call>\nnot json\n</tool_call> end", "no <tool_call>\nnot json\n</tool_call> end", []),
    ("tags", 'a <tool_call>{"arguments": {}}', 'a <tool_call>{"arguments": {}}', []),
    ("tags", "a < b, <tool and </tool_call>\n", "a < b, <tool and </tool_call>\n", []),
    (
        "list",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", {"a": 1}), ("g", {})],
    ),
    (
        "list",
        'Well. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{"b": [2]}',
        "Well.",
        [("f", {"a": 1}), ("g", {"b": [2]})],
    ),
    ("list", '[TOOL_CALLS]f{"a": 1}', "", [("f", {"a": 1})]),
    ("list", 'Hm. <TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL>', "Hm.", [("f", {"a": 1})]),
    ("list", "no </TOOLCALL> here", "no </TOOLCALL> here", []),
    ("sections", "Hm. " + SECTIONS, "Hm.", [("f", {"a": 1}), ("g", {"b": {}})]),
    (
        "bare",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", {"a": 1}), ("g", {})],
    ),
    ("bare", '<|python_tag|>{"name": "f", "parameters": {"a": "x"}}', "", [("f", {"a": "x"})]),
    ("bare", '{"name": "f", "parameters": "{\\"a\\": 1}"}', "", [("f", {"a": 1})]),
    ("bare", '{"name": "other", "parameters": {}} more', '{"name": "other", "parameters": {}} more', []),
    ("bare", '{"value": [3]}', '{"value": [3]}', []),
    ("bare", '  see {"name": "f"}', '  see {"name": "f"}', []),
    (
        "elements",
        "Well.\n<tool_call>\n<function=f>\n<parameter=text>\na <b>\n  </function>\n</parameter>\n"
        "<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=g>\n</function>\n</tool_call>",
        "Well.",
        [("f", {"text": "a <b>\n  </function>", "count": 3}), ("g", {})],
    ),
    (
        "elements",
        '<function=f><parameter=deep>\n{"é": [1, "\\ud800"]} </parameter><parameter=yes>True</parameter>'
        "<parameter=maybe>null</parameter><parameter=other>7</parameter></function> done",
        " done",
        [("f", {"deep": {"é": [1, "\ud800"]}, "yes": True, "maybe": None, "other": "7"})],
    ),
    (
        "elements",
        "<tool_call><function=f><parameter=count>NaN</parameter><parameter=text>\n\n1\n</parameter></tool_call>",
        "",
        [("f", {"count": "NaN", "text": "\n1"})],
    ),
    ("elements", "a <tool_call>\n{} <function", "a <tool_call>\n{} <function", []),
    ("elements", "<tool_call>\n <function=f", "<tool_call>\n <function=f", []),
]


PARAMETERS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "deep": {"$ref": "#/$defs/deep"},
            "yes": {"type": ["boolean", "integer"]},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    },
    "g": {"properties": True},
}


def read(plan: AnswerPlan, pieces: list[str]) -> tuple[str, str, Calls]:
    """(thought, text, calls) of an answer that comes in these pieces."""
    reader = plan.reader()
    parts: list[Part] = []
    for at, piece in enumerate(pieces):
        parts += reader.push(piece, is_last=at == len(pieces) - 1)
    thought, text = "", ""
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, Thought):
            thought += part.text
        elif isinstance(part, Text):
            text += part.text
        elif isinstance(part, CallStart):
            assert part.index == len(calls)
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            calls[part.index][1] += part.text.encode().decode()  # as it is sent
    assert reader.num_calls == len(calls)
    return thought, text, [(name, json.loads(arguments)) for name, arguments in calls]


def cut(text: str, random: Random) -> list[str]:
    places = sorted(random.sample(range(1, len(text)), random.randint(0, len(text) - 1)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_found_however_the_text_is_cut(form: ToolFormat, text: str, content: str, calls: Calls) -> None:
    plan = AnswerPlan(tool_format=form, tool_names=["f", "g"], tool_parameters=PARAMETERS)
    random = Random(0)
    for pieces in ([text], list(text), *(cut(text, random) for _ in range(20))):
        assert read(plan, pieces) == ("", content, calls)


@pytest.mark.parametrize(
    ("is_open", "text", "thought", "content"),
    [
        (False, "<think>\nhm < 3\n</think>\n\nYes <think>", "\nhm < 3\n", "Yes <think>"),
        (False, "\n<think></think>Yes", "", "Yes"),
        (False, "Yes, I <think> so</think>", "", "Yes, I <think> so</think>"),
        (False, "<thin", "", "<thin"),
        (True, "hm\n</think>\n\nYes", "hm\n", "Yes"),
        (True, "never ends </thi", "never ends </thi", ""),
        (True, "\n</think>\n\n", "\n", ""),
    ],
)
def test_thoughts(is_open: bool, text: str, thought: str, content: str) -> None:
    plan = AnswerPlan(thoughts=True, is_thinking=is_open)
    random = Random(0)
    for pieces in ([text], list(text), *(cut(text, random) for _ in range(20))):
        assert read(plan, pieces) == (thought, content, [])
    hidden = AnswerPlan(thoughts=True, is_thinking=is_open, shows_thoughts=False)
    assert read(hidden, list(text)) == ("", content, [])


def test_thoughts_and_calls_together_and_only_one_call() -> None:
    text = '<think>I need f</think>\n\nNow.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    both = text + '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    plan = AnswerPlan(thoughts=True, tool_format="tags", tool_names=["f", "g"])
    assert read(plan, list(both)) == ("I need f", "Now.", [("f", {}), ("g", {})])
    single = AnswerPlan(thoughts=True, tool_format="tags", tool_names=["f", "g"], one_call=True)
    assert read(single, list(both)) == ("I need f", "Now.", [("f", {})])


def test_answers_that_can_only_be_calls() -> None:
    text = '[{"name": "f", "arguments": {"a": 1}},\n {"name": "g", "arguments": {}}]'
    for pieces in ([text], list(text)):
        assert read(AnswerPlan(only_calls=True), pieces) == ("", "", [("f", {"a": 1}), ("g", {})])
        assert read(AnswerPlan(only_arguments_of="f"), pieces)[2] == [("f", json.loads(text))]


def test_a_call_is_streamed_while_it_is_written() -> None:
    reader = AnswerPlan(tool_format="tags", tool_names=["f"]).reader()
    assert reader.push('Yes.<tool_call>{"name": "f", "argu') == [Text("Yes."), CallStart(0, "f")]
    assert reader.push('ments": {"a": ') == [CallArguments(0, '{"a": ')]
    assert reader.push("1}}</tool_call>", is_last=True) == [CallArguments(0, "1}")]


def test_a_call_that_is_cut_off_stays_as_far_as_it_came() -> None:
    reader = AnswerPlan(tool_format="elements", tool_parameters=PARAMETERS).reader()
    written = "<tool_call><function=f><parameter=count>3</parameter><parameter=text>half"
    parts = reader.push(written, is_last=True)
    assert parts == [CallStart(0, "f"), CallArguments(0, "{"), CallArguments(0, '"count": 3')]


@pytest.mark.parametrize("form", ["tags", "list", "sections", "bare", "elements"])
def test_long_hostile_outputs_take_linear_time(form: ToolFormat) -> None:
    """CPU time: twice the text may take twice as long, not four times; with much room for a busy machine."""
    starts = {"tags": "<tool_call>", "list": "[TOOL_CALLS]", "sections": SECTIONS[:21], "bare": "", "elements": ""}
    pieces = [
        '{"name": "f", "arguments": ' + "[" * 50,
        "<tool_call",
        "{" * 50,
        '"' * 51,
        "\\" * 50,
        "[TOOL_CALLS]",
        "<tool_call><function=f>" + "<parameter=" * 9,
        "</parameter" * 9 + ">",
        " " * 9,
    ]
    random = Random(1)
    text = starts[form] + "".join(random.choice(pieces) for _ in range(2000))
    began = time.process_time()
    reader = AnswerPlan(thoughts=True, tool_format=form, tool_names=["f"]).reader()
    for at in range(0, len(text), 3):
        reader.push(text[at : at + 3])
    reader.push("", is_last=True)
    assert time.process_time() - began < 5


def test_formats_are_told_apart_by_the_template() -> None:
    assert tool_format("{% if tools %}<tool_call>") == "tags"
    assert tool_format("{% if tools %}[AVAILABLE_TOOLS] [TOOL_CALLS]") == "list"
    assert tool_format("{% if tools %}<TOOLCALL>") == "list"
    assert tool_format("{% if tools %}<｜tool▁calls▁begin｜>") == "sections"
    assert tool_format("{% if tools %}{'name':") == "bare"
    assert tool_format("{% if tools %}<tool_call><function=f><parameter=p>") == "elements"
    assert tool_format("{{ messages }}") is None
