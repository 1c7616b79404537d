"""What a choice of formats costs, told by the command, on a model small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality.__main__ import main, subject
from benchmarks.quality.lookup import lookups
from holdfast.errors import ConfigurationError
from services.engine.quality.passages import tokenizer_of

TEMPLATE = "<s>{% for message in messages %}{{ message.content }}{% endfor %}"
ENGINE = "device=cpu threads=1 block_size=16 dtype=float32"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(stories260k: Path, tmp_path: Path) -> Path:
    """The tiny model, made to talk."""
    folder = tmp_path / "stories"
    folder.mkdir()
    for file in stories260k.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A file of conversations in all forms, one of which is too long."""
    path = tmp_path / "chat.jsonl"
    given: list[dict[str, Any]] = [
        {"turns": ["Once upon a time", "And then?"]},
        {"question": "word " * 400},
        {"question": "There was a girl"},
        {"prompt": "Tom and Lily"},
        {"messages": [{"role": "user", "content": "The dog"}]},
        {"prompt": "One more than is asked for"},
    ]
    path.write_text("\n".join(map(json.dumps, given)))
    return path


def told(report: dict[str, Any], title: str) -> list[dict[str, Any]]:
    """The rows of the table whose title begins so, by column; of columns of one name the last."""
    (table,) = [each for each in report["tables"] if each["title"].startswith(title)]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_one_run_tells_all_that_is_asked_for(
    stories260k: Path, folder: Path, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, answers, lookups and layers, as tables, JSON and drawings."""
    out, plots, text = tmp_path / "report.json", tmp_path / "plots", stories260k / "expected_greedy_200.txt"
    options = f"--window 192 --tokens 192 --chunk 64 --prompts 4 --answer 24 --lookups 4 --out {out} --plots {plots}"
    main(
        [str(folder), "--text", str(text), "--chat", str(chat), "--reference", ENGINE, *options.split()]
        + ["--with", "quantization=fp8", "--with", "kv_cache_dtype=int8", "--with", f"model={stories260k}"]
        + ["--sensitivity", "fp8", "--sensitivity-tokens", "192"]
    )
    report = json.loads(out.read_text())
    assert report["settings"]["text"]["file"] == text.name

    plain, fp8, cache, same = told(report, "Text: 1 windows of 192 tokens, 191 judged")
    assert plain["settings"] == ENGINE
    assert plain["mean KL"] == same["mean KL"] == plain["change, %"] == 0 < cache["mean KL"] < fp8["mean KL"]
    assert plain["bits a weight in memory"] < 32.01 < fp8["bits a weight in memory"]
    assert cache["cache bytes a token"] == 5 * 2 * 4 * (8 + 4)

    plain, fp8, *_ = told(report, "Chat: 4 answers of the reference, 24.0 tokens long at the mean, 96 judged; 1 longer")
    assert plain["agreed, median"] == plain["agreed, mean"] == 24 > fp8["agreed, mean"] > 0

    assert [row["right"] for row in told(report, "Lookups: numbers of 8 names in the context, 4 asked for")] == [0] * 4

    layers = told(report, "One part quantized, all others as they are: 191 tokens judged")
    assert [row["part"] for row in layers] == [
        "model.embed_tokens", *(f"model.layers.{index}" for index in range(5)), "lm_head",
    ]  # fmt: skip
    assert layers[0]["mean KL"] == layers[-1]["mean KL"] == 0
    assert all(row["mean KL"] > 0 for row in layers[1:-1])

    drawn = {path.name: path.read_text() for path in plots.iterdir()}
    assert drawn.keys() == {"bits.svg", "sensitivity.svg"}
    assert all("</svg>" in each for each in drawn.values())
    assert "quantization=fp8" in drawn["bits.svg"]
    assert "windows: 1 of 1" in capsys.readouterr().out


def test_lookups_are_the_same_every_time(stories260k: Path) -> None:
    """The answer is what comes after the name: a number of the list, and the end of the line."""
    tokenizer = tokenizer_of(stories260k)
    first, *others = lookups(tokenizer, 3)
    assert [first, *others] == lookups(tokenizer, 3)
    text, question = tokenizer.decode(first.ids), tokenizer.decode(first.ids[: first.first])
    answer = text.removeprefix(question).strip().removesuffix(".")
    name = question.split()[-2]
    assert answer.isdecimal()
    assert f"{name}: {answer}\n" in question


def test_windows_that_the_model_does_not_take_are_refused(stories260k: Path) -> None:
    """And values that its settings cannot have."""
    with pytest.raises(ConfigurationError, match="a window has 600 tokens, and the model takes 512: lower --window"):
        subject("", stories260k, "device=cpu threads=1", window=600)
    with pytest.raises(ConfigurationError, match="block_size: Input should be 16, 32 or 64, not 'abc'"):
        subject("", stories260k, "block_size=abc", window=48)


def test_another_tokenizer_is_refused(
    folder: Path, stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its numbers would mean other words."""
    other = tmp_path / "other"
    other.mkdir()
    for file in stories260k.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = str(stories260k / "expected_greedy_200.txt")
    with pytest.raises(SystemExit):
        main([str(folder), "--text", text, "--window", "64", "--reference", ENGINE, "--with", f"model={other}"])
    assert "other has another tokenizer than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("no json", "line 1: not JSON"),
        ('{"text": "hello"}', "line 1: no conversation; it must be an object with `messages`"),
        ('{"turns": []}', "line 1: no conversation"),
        (json.dumps({"prompt": "word " * 400}), "has no conversation of at most 56 tokens: raise --window"),
    ],
)
def test_what_holds_no_conversations_is_refused(
    content: str, says: str, folder: Path, stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the file and the line."""
    chat = tmp_path / "chat"
    chat.write_text(content)
    text = str(stories260k / "expected_greedy_200.txt")
    options = ["--window", "64", "--answer", "8", "--reference", ENGINE]
    with pytest.raises(SystemExit):
        main([str(folder), "--text", text, "--chat", str(chat), *options])
    assert says in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused(
    stories260k: Path, chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there are conversations."""
    text = str(stories260k / "expected_greedy_200.txt")
    with pytest.raises(SystemExit):
        main([str(stories260k), "--text", text, "--window", "64", "--answer", "8", "--chat", str(chat)])
    assert "has no chat template; leave out --chat" in capsys.readouterr().err


def test_a_text_shorter_than_a_window_ends_the_benchmark(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one line."""
    text = tmp_path / "text"
    text.write_text("Once upon a time")
    with pytest.raises(SystemExit):
        main([str(stories260k), "--text", str(text), "--window", "64"])
    assert "the text is too short" in capsys.readouterr().err
