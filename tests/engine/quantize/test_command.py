"""The command, from a folder to a folder."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.client import Client
from holdfast.events import Tokens
from holdfast.settings import load as load_settings
from services.__main__ import serve
from services.engine.models import load
from services.engine.quality.forced import Forced
from services.engine.quality.passages import tokenizer_of, windows_of
from services.engine.quality.scores import compare
from services.engine.quantize import __main__ as command
from services.engine.quantize import job
from services.engine.quantize.work import SUFFIX
from services.settings import MeshSettings

RULES = "*.down_proj=int8-weight,int4-g32"
RESUMES = "the same command goes on from there"
SHOWN = ("--tokens", "192", "--window", "48", "--quality-tokens", "0")


def run(*arguments: object) -> None:
    command.main([str(each) for each in arguments])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What it says instead of writing anything."""
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    return str(ended.value) if isinstance(ended.value.code, str) else capsys.readouterr().err


def test_what_was_stopped_is_taken_up(
    stories260k: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any layer, by the same command, as it says; finished layers are not computed again, and what comes out is the same to the bit."""
    asked = ("--scheme", RULES, "--method", "gptq", "--calibrate", text, *SHOWN)
    run(stories260k, tmp_path / "whole", *asked)
    layers = []
    real = job.quantize_layer

    def dies(*arguments: Any, **more: Any) -> Any:
        layers.append(arguments[3])
        if len(layers) in (3, 5):
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(job, "quantize_layer", dies)
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            run(stories260k, tmp_path / "out", *asked)
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"quantize: stopped. {tmp_path / f'out{SUFFIX}'} remains, with what is finished; {RESUMES}"
        assert not (tmp_path / "out").exists()
    run(stories260k, tmp_path / "out", *asked)
    assert layers == [0, 1, 2, 2, 3, 3, 4]
    assert not (tmp_path / f"out{SUFFIX}").exists()
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert torch.equal(found[name], each), name


def test_one_layer_is_in_memory_at_a_time(
    stories260k: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When one is begun, nothing holds the tensors of those before it."""
    layers: list[weakref.ref[object]] = []
    real = job.quantize_layer

    def watched(*arguments: Any, **more: Any) -> Any:
        assert not any(each() for each in layers)
        found = real(*arguments, **more)
        layers.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(job, "quantize_layer", watched)
    run(stories260k, tmp_path / "out", "--scheme", RULES, "--method", "awq", "--calibrate", text, *SHOWN)
    assert len(layers) == 5


def stopped_behind_the_first(*arguments: object) -> None:
    """Runs, and is interrupted when one layer is finished."""
    real = job.quantize_layer

    def dies(*arguments: Any, **more: Any) -> Any:
        if arguments[3] == 1:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr(job, "quantize_layer", dies)
        run(*arguments)


def copied(model: Path, to: Path) -> Path:
    """A copy that can be written to."""
    to.mkdir()
    for path in model.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_the_work_of_another_command_is_left_alone(
    stories260k: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what differs; and what was finished is still there for the command that began it."""
    asked = [stories260k, tmp_path / "out", "--scheme", RULES, "--calibrate", text, *SHOWN]
    stopped_behind_the_first(*asked, "--method", "gptq")
    message = refused(capsys, *asked, "--method", "awq")
    assert "was begun by another command: method was 'gptq' and is 'awq'" in message
    run(*asked, "--method", "gptq")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_model_that_has_changed_meanwhile_is_not_gone_on_with(
    name: str, stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers of two configs, or of a text in two kinds of tokens, are not one checkpoint; the file is named."""
    model = copied(stories260k, tmp_path / "model")
    stopped_behind_the_first(model, tmp_path / "out", "--scheme", "int8")
    content = (model / name).read_bytes()
    (model / name).write_bytes(content + b"\n")
    message = refused(capsys, model, tmp_path / "out", "--scheme", "int8")
    assert re.search(rf"was begun by another command: {name} was '[0-9a-f]+' and is '[0-9a-f]+'\. Ask", message), (
        message
    )
    (model / name).write_bytes(content)
    run(model, tmp_path / "out", "--scheme", "int8")


def lacks(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.4.mlp.down_proj.weight"]


def has_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.4.mlp.down_proj.scale"] = torch.ones(3)


def has_fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.4.self_attn.q_proj.weight"] = torch.ones(32, 64)


@pytest.mark.parametrize("asked", [["--scheme", "int8"], ["--budget", "6.5", "--calibrate"]], ids=["scheme", "budget"])
@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lacks, {}, r"lacks the tensor model\.layers\.4\.mlp\.down_proj\.weight"),
        (has_more, {}, r"holds tensors that the model has no place for: model\.layers\.4\.mlp\.down_proj\.scale$"),
        (has_fewer_rows, {}, r"model\.layers\.4\.self_attn\.q_proj\.weight has shape \[32, 64\], but the config makes it \[64, 64\]"),
        (None, {"vocab_size": 400}, r"model\.embed_tokens\.weight has shape \[512, 64\], but the config makes it \[400, 64\]"),
        (None, {"num_hidden_layers": 6}, r"lacks the tensor model\.layers\.5\.input_layernorm\.weight"),
        (None, {"num_hidden_layers": 4}, r"has no place for: model\.layers\.4\.input_layernorm"),
        (None, {"tie_word_embeddings": False}, r"lacks the tensor lm_head\.weight"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_what_its_config_says_is_refused_first(
    asked: list[str],
    change: Callable[[dict[str, torch.Tensor]], None] | None,
    config: dict[str, Any],
    message: str,
    stories260k: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the names and shapes of all its tensors, the last layer's too, before any of them is read for work."""
    model = copied(stories260k, tmp_path / "model")
    content = load_file(model / "model.safetensors")
    if change is not None:
        change(content)
    save_file(content, model / "model.safetensors")
    said = json.loads((model / "config.json").read_text()) | config
    (model / "config.json").write_text(json.dumps(said))
    monkeypatch.setattr(job, "quantize_layer", None)
    monkeypatch.setattr(job, "measured_costs", None)
    shown = [text, *SHOWN] if "--calibrate" in asked else []
    found = refused(capsys, model, tmp_path / "out", *asked, *shown)
    assert re.search(message, found), found
    assert not (tmp_path / f"out{SUFFIX}").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can be longer, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("size", "file", "done"), [(40_000, "layer-00001", 1), (200_000, "checkpoint/model", 5)], ids=["layer", "all"]
)
def test_a_full_disk_is_said_and_gone_on_from(
    size: int,
    file: str,
    done: int,
    stories260k: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file is named, and nothing half written takes room; what was finished is not computed again."""
    asked, work = (stories260k, tmp_path / "out", "--scheme", "int8"), tmp_path / f"out{SUFFIX}"
    stopped_behind_the_first(*asked)
    with largest_file(size):
        message = refused(capsys, *asked)
    said = rf"quantize: {work}/{file}\S+ cannot be written: .*File too large.*\. {work} remains, .*{RESUMES}"
    assert re.fullmatch(said, message), message
    assert not list(work.glob("*.new"))
    layers, real = [], job.quantize_layer

    def counted(*arguments: Any, **more: Any) -> Any:
        layers.append(arguments[3])
        return real(*arguments, **more)

    monkeypatch.setattr(job, "quantize_layer", counted)
    run(*asked)
    assert layers == [*range(done, 5)]
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("name", ["command.json", "layer-00000.safetensors", "states-00001.safetensors"])
@pytest.mark.parametrize("is_there", [True, False])
def test_work_that_cannot_be_read_is_named(
    is_there: bool, name: str, stories260k: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to remove, after which the same command begins anew."""
    asked = (stories260k, tmp_path / "out", "--scheme", RULES, "--method", "gptq", "--calibrate", text, *SHOWN)
    stopped_behind_the_first(*asked)
    work = tmp_path / f"out{SUFFIX}"
    content = (work / name).read_bytes()
    if is_there:
        (work / name).write_bytes(content[: len(content) // 2])
    else:
        (work / name).unlink()
    if name.startswith("states") or is_there:
        message = refused(capsys, *asked)
        said = rf"quantize: {work / name} is missing or damaged \(.*\); remove {work}, and the same command begins anew"
        assert re.fullmatch(said, message), message
        shutil.rmtree(work)
    run(*asked)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("method", ["absmax", "gptq"])
def test_nothing_is_made_of_what_is_no_number(
    method: str,
    name: str,
    value: float,
    stories260k: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever it stands: the tensor is named, no other that sees its products; neither a checkpoint nor work is left."""
    broken = copied(stories260k, tmp_path / "broken")
    content = load_file(broken / "model.safetensors")
    content[name].view(-1)[5] = value
    save_file(content, broken / "model.safetensors")
    shown = ["--calibrate", text, *SHOWN] if method == "gptq" else []
    message = refused(capsys, broken, tmp_path / "out", "--scheme", RULES, "--method", method, *shown)
    assert f"the tensor {name} holds values that are not finite numbers" in message
    assert not list(tmp_path.glob("out*"))


def test_a_head_that_is_not_the_embedding_is_looked_at_too(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where it is the embedding, what else is called so counts for nothing."""
    model = copied(stories260k, tmp_path / "model")
    content = load_file(model / "model.safetensors")
    save_file(content | {"lm_head.weight": torch.full((512, 64), float("nan"))}, model / "model.safetensors")
    run(model, tmp_path / "tied", "--scheme", "int8")
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    message = refused(capsys, model, tmp_path / "out", "--scheme", "int8")
    assert "the tensor lm_head.weight holds values that are not finite numbers" in message


def test_whole_numbers_without_scales_are_refused(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are weights of a quantized model whose config does not say so."""
    model = copied(stories260k, tmp_path / "model")
    content = load_file(model / "model.safetensors")
    name = "model.layers.4.self_attn.q_proj.weight"
    save_file(content | {name: content[name].to(torch.int8)}, model / "model.safetensors")
    assert f"the tensor {name} holds int8" in refused(capsys, model, tmp_path / "out", "--scheme", "int8")


def test_shards_hold_what_one_file_holds(stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index; layers that fit into one stay together."""
    run(stories260k, tmp_path / "one", "--scheme", "int8")
    monkeypatch.setattr(job, "MOST_BYTES", 150_000)
    run(stories260k, tmp_path / "several", "--scheme", "int8")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert {path.name for path in (tmp_path / "several").glob("*.safetensors")} == files
    found, expected = tensors(tmp_path / "several"), tensors(tmp_path / "one")
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    for name, each in expected.items():
        assert torch.equal(found[name], each)
    assert index["metadata"]["total_size"] == sum(each.numel() * each.element_size() for each in found.values())


def test_everything_else_of_the_model_comes_along(stories260k: Path, tmp_path: Path) -> None:
    """Tokenizer and licence as they are; the config with what is quantized, and otherwise the same."""
    run(stories260k, tmp_path / "out", "--scheme", "int8")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (stories260k / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == json.loads((stories260k / "config.json").read_text())
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["matrices"] == {"int8, absmax": 35}
    assert 8 < report["bits_per_weight"] < 16
    assert "| 35 | int8, absmax |" in (tmp_path / "out" / "quantization_report.md").read_text()


def test_options_that_are_used_are_taken(stories260k: Path, text: Path, tmp_path: Path) -> None:
    """By a file's groups and by the method alike, for the embedding as well; and they change what is written."""
    groups = tmp_path / "groups.yaml"
    groups.write_text(
        """
        attention: {bits: 4, group_size: 32, calibration: gptq}
        ffn: {bits: 8, activations: static}
        embedding: {bits: 8, calibration: percentile}
        """
    )
    shown = ("--config", groups, "--calibrate", text, *SHOWN)
    told = ("--damping", "0.5", "--no-act-order", "--activations", "absmax", "--percentile", "90")
    run(stories260k, tmp_path / "out", *shown, *told)
    run(stories260k, tmp_path / "other", *shown)
    found, other = (tensors(tmp_path / name) for name in ("out", "other"))
    layer = "model.layers.0"
    for name in (f"{layer}.self_attn.q_proj.weight_packed", f"{layer}.mlp.up_proj.input_scale"):
        assert not torch.equal(found[name], other[name])
    table = "model.embed_tokens.weight_scale"
    assert (found[table] < other[table]).all()


async def test_it_is_served_as_is_said_in_the_end(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the last line, whatever the folder is called; and goes on with a story."""
    run(stories260k, tmp_path / "a model", "--scheme", "int8")
    said, _, command_line = capsys.readouterr().out.splitlines()[-1].rpartition(": ")
    python, *words = shlex.split(command_line)
    assert (said, python) == (f"{tmp_path / 'a model'} is there; to serve it", "python")
    assert words[:2] == ["-m", "services"]
    anywhere = ("--gateway.address", "127.0.0.1:0", "--gateway.http-address", "127.0.0.1:0")
    settings = load_settings(MeshSettings, [*words[2:], *anywhere, "--engine.threads", "1"])
    async with (
        serve(settings) as mesh,
        Client(mesh.grpc) as client,
        client.generate("Once upon a time", temperature=0, max_tokens=8) as answer,
    ):
        text = "".join([event.text async for event in answer if isinstance(event, Tokens)])
    assert text.startswith(", there was")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--scheme", "int5"], "'int5' is no rule; it must be one of none, fp8"),
        (["--scheme", "*.gate_up_proj=int8"], r"decides about no matrix"),
        (["--scheme", "int4-g64"], r"layers.0.mlp.down_proj: int4-g64 keeps 64 inputs in a group, and there are 172; say int8-weight"),
        (["--scheme", "none"], "the rules leave every matrix as it is"),
        (["--scheme", "*.q_proj=int8"], "q_proj, model.layers.0.self_attn.k_proj.*must give all of them the same format"),
        (["--scheme", RULES, "--method", "gptq"], "must be shown a text.*--calibrate"),
        (["--scheme", "int8-static"], "must be shown a text.*--calibrate"),
        (["--scheme", RULES, "--method", "smoothquant", "--calibrate", "text"], "layers.0.self_attn.q_proj.*smoothquant makes.*int4-g32 keeps them as they are; say awq or gptq"),
        (["--scheme", "int8", "--calibrate", "text"], "nothing that is asked for needs to see one"),
        (["--scheme", RULES, "--method", "gptq", "--calibrate", "short"], r"short\.txt is too short: it has"),
        (["--scheme", RULES, "--method", "gptq", "--calibrate", "text", "--tokens", "100000"], "text.txt is too short: it fills"),
        (["--scheme", RULES, "--method", "gptq", "--calibrate", "binary"], "is no text: byte 1 is not UTF-8"),
        (["--scheme", RULES, "--method", "gptq", "--calibrate", "text", "--window", "5000"], "a window of 5,000 tokens: the model takes 512"),
        (["--scheme", "int8", "--damping", "0.1"], "--damping changes nothing without the method gptq; leave it out"),
        (["--scheme", "int8", "--no-act-order"], "--no-act-order changes nothing without the method gptq"),
        (["--scheme", "int8", "--percentile", "99"], "--percentile changes nothing without the method percentile"),
        (["--scheme", "int8", "--strength", "0.4"], "--strength changes nothing without the method smoothquant"),
        (["--scheme", "int8", "--activations", "mse"], "--activations changes nothing without int8-static"),
        (["--scheme", "int8", "--formats", "int8"], "--formats changes nothing without --budget"),
        (["--scheme", "int8", "--budget-tokens", "64"], "--budget-tokens changes nothing without --budget"),
        (["--scheme", "int8", "--tokens", "64", "--evaluate", "text"], "--tokens changes nothing without --calibrate"),
        (["--scheme", "int8", "--window", "64"], "--window changes nothing without --calibrate or --evaluate"),
        (["--scheme", "int8", "--evaluate", "text", "--quality-tokens", "0"], "--evaluate changes nothing without --quality-tokens above 0"),
        (["--budget", "5", "--calibrate", "text", "--strength", "0.4"], "--strength changes nothing without the method smoothquant"),
        (["--scheme", "*=fp8"], "model.embed_tokens cannot be kept in fp8, for rows of it are looked up"),
        (["--scheme", "lm_head=int8-static", "--calibrate", "text"], "lm_head cannot be kept in int8-static"),
        (["--scheme", "int8", "--method", "gtpq"], "invalid choice: 'gtpq'"),
        (["--config", "groups"], "ffn: 'bit' is not known"),
        ([], "one of the arguments --scheme --config"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    asked: list[str], message: str, stories260k: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is made, in a line that says what would be right."""
    files = {
        "text": text,
        "short": tmp_path / "short.txt",
        "binary": tmp_path / "binary",
        "groups": tmp_path / "groups.toml",
    }
    files["short"].write_text("Once upon a time")
    files["binary"].write_bytes(b"a\xff\xfe")
    files["groups"].write_text("ffn = { bits = 4, bit = 3 }")
    before = sorted(tmp_path.iterdir())
    found = refused(capsys, stories260k, tmp_path / "out", *(str(files.get(each, each)) for each in asked))
    assert re.search(message, found), found
    assert sorted(tmp_path.iterdir()) == before


def test_folders_that_are_there_and_models_that_cannot_be_are_refused(
    stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint is not written over, nor made of one that is in few bits already; a family that is not computed natively is
    named."""
    run(stories260k, tmp_path / "out", "--scheme", "int8")
    assert "out is there already" in refused(capsys, stories260k, tmp_path / "out", "--scheme", "int8")
    assert "is quantized already (compressed-tensors)" in refused(
        capsys, tmp_path / "out", tmp_path / "two", "--scheme", "int8"
    )
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((stories260k / "config.json").read_text()) | {"architectures": ["GPTNeoXForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    message = refused(capsys, other, tmp_path / "two", "--scheme", "int8")
    assert "GPTNeoXForCausalLM is not among the natively computed LlamaForCausalLM" in message


def test_the_checkpoint_is_judged_beside_the_model(stories260k: Path, text: Path, tmp_path: Path) -> None:
    """By what follows in the text of calibration, or by another one: as the same models are when they are compared by hand."""
    asked = (
        "--scheme",
        "*.mlp.*=int8,int4-g32",
        "--method",
        "gptq",
        "--calibrate",
        text,
        "--tokens",
        192,
        "--window",
        48,
    )
    run(stories260k, tmp_path / "one", *asked, "--quality-tokens", 96)
    run(stories260k, tmp_path / "two", *asked, "--quality-tokens", 96, "--evaluate", text)
    windows = windows_of(text.read_text(), tokenizer_of(stories260k), length=48, most_tokens=288)
    for name, judged in (("one", windows[4:]), ("two", windows[:2])):
        folder = tmp_path / name
        found = json.loads((folder / "quantization_report.json").read_text())["quality"]
        both = [Forced.of(name, load(each, dtype=torch.float32), longest=48) for each in (stories260k, folder)]
        before, after = (each.figures() for each in compare(both[0], both[1:], judged, chunk=48))
        assert found["before"]["perplexity"] == pytest.approx(before.perplexity)
        assert found["after"]["mean_kl"] == pytest.approx(after.mean_kl, rel=0.02)
        assert 0 < after.mean_kl < 0.05
        assert "| mean KL, nats | |" in (folder / "quantization_report.md").read_text()


def test_a_file_of_groups_says_how_each_is_rounded(stories260k: Path, text: Path, tmp_path: Path) -> None:
    """By its `calibration`; where that is not said, the method that is asked for."""
    groups = tmp_path / "groups.toml"
    groups.write_text(
        'attention = { bits = 4, group_size = 32, calibration = "gptq" }\nffn = { bits = 8 }\nembedding = { bits = 16 }\n'
    )
    run(stories260k, tmp_path / "out", "--config", groups, "--method", "mse", "--calibrate", text, *SHOWN)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["matrices"] == {"int4-g32, gptq": 20, "int8, mse": 15}
