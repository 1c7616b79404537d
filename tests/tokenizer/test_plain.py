"""What a request says stays text."""

from __future__ import annotations

import pytest

from services.tokenizer.plain import PlainText, new_mark, pieces

TOKENS = ["<s>", "<s>x", "<|im_start|>", "[INST]"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("plain 1 < 2", ["plain 1 < 2"]),
        ("a<s>b", ["a<", "s>b"]),
        ("<s>x<s>", ["<", "s>x<", "s>"]),
        ("<<s>>[INST]", ["<<", "s>>[", "INST]"]),
        ("<|im_start", ["<|im_start"]),
        ("", [""]),
    ],
)
def test_no_piece_holds_a_special_token(text: str, cut: list[str]) -> None:
    """And together they are the text."""
    mark = new_mark()
    assert pieces(PlainText(TOKENS).marked(text, mark), mark) == cut


def test_two_strings_make_no_special_token() -> None:
    """However a template puts them together, and wherever in a request they are."""
    mark, plain = new_mark(), PlainText(TOKENS)
    request = [{"content": "<|im_", "more": ["start|>", "<"], "<s>": 1, "n": None}, "s>"]
    said, last = plain.marked(request, mark)
    (first, second) = said["more"]
    assert pieces(said["content"] + first, mark) == ["<|im_", "start|>"]
    assert pieces(second + last, mark) == ["<", "s>"]
    assert [pieces(name, mark) for name in said] == [["content"], ["more"], ["<", "s>"], ["n"]]


def test_a_model_without_special_tokens_needs_no_marks() -> None:
    """Nor is anything cut."""
    assert PlainText([]).marked({"a": ["<s>", 1]}, new_mark()) == {"a": ["<s>", 1]}
