"""A layer that is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from holdfast import models
from holdfast.errors import ConfigurationError
from services.engine.calibrate.choice import Choice, Options
from services.engine.calibrate.layer import LayerWork
from services.engine.calibrate.observe import Held
from services.engine.calibrate.parts import sharings
from services.engine.calibrate.statistics import Moments
from services.engine.calibrate.stream import Stream, quantize_layer
from services.engine.models import load
from services.engine.models.spec import ModelSpec, read_config
from services.engine.quality.passages import Passage, text_of, tokenizer_of, windows_of
from services.engine.quant.rules import FORMATS
from services.engine.weight_format import Method, WeightFormat
from services.engine.weights import Checkpoint, Dummy, Weights, open_checkpoint
from tests.conftest import missing
from tests.engine.batches import Bench
from tests.engine.calibrate.toys import config_of
from tests.engine.test_models import NATIVE

FLOAT32 = {"dtype": torch.float32, "device": torch.device("cpu")}
IDS = [(7 * n * n + 3) % 97 for n in range(40)]


def choices(spec: ModelSpec, index: int, method: Method, *formats: WeightFormat) -> list[Choice]:
    """For each sharing the first format that fits."""
    found = []
    for sharing in sharings(spec, index):
        fits = [FORMATS[name] for name in (*formats, WeightFormat.NONE)]
        format = next(each for each in fits if each.scheme is None or each.scheme.fits(sharing.inputs))
        found.append(Choice(format, method, sharing))
    return found


class Varied(Dummy):
    """Norms and biases that are not all alike, and inputs of very different sizes."""

    def fill(self, name: str, out: Tensor) -> None:
        super().fill(name, out)
        if name.endswith("norm.weight"):
            out.mul_(torch.logspace(-1, 1, out.numel()))


@pytest.mark.parametrize("method", [Method.AWQ, Method.SMOOTHQUANT])
@pytest.mark.parametrize("name", NATIVE)
def test_scales_leave_the_function_as_it_was(
    name: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every family: heads that share values, biases, experts behind a norm. Rounding is left out, and scales are not small."""
    spec = ModelSpec.from_config(read_config(config_of(tmp_path, name)))
    weights: Weights = Varied(**FLOAT32)
    states = torch.randn(2, len(IDS), spec.hidden, generator=torch.Generator().manual_seed(0))
    windows = [Passage(IDS)] * 2
    before, after = (Stream(spec, windows, states) for _ in range(2))
    held = Held(weights)
    before.advance(held, 1, {})
    wanted = choices(spec, 1, method, WeightFormat.INT8)
    moments = {each.sharing: Moments(each.sharing.inputs) for each in wanted if each.needs_moments}
    after.see(held, 1, {f"model.layers.1.{sharing.names[0]}": each.add for sharing, each in moments.items()})
    plain = dict(held.tensors)
    work = LayerWork("model.layers.1", spec, held.tensors, wanted, moments, Options(strength=0.7), torch.float32)
    monkeypatch.setattr(LayerWork, "_rounded", lambda self, choice: {})
    work.quantized()
    after.advance(held, 1, {})
    change = plain["model.layers.1.self_attn.q_proj.weight"] / held.tensors["model.layers.1.self_attn.q_proj.weight"]
    if method is Method.SMOOTHQUANT:
        assert change.max() / change.min() > 3
    torch.testing.assert_close(after.states_WNI, before.states_WNI, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
def test_the_text_goes_through_layers_as_through_the_model(name: str, tmp_path: Path) -> None:
    """Layer by layer, what stands before the head is what the whole model has there."""
    folder = config_of(tmp_path, name)
    spec = ModelSpec.from_config(read_config(folder))
    weights = Dummy(**FLOAT32)
    stream = Stream.begun(spec, [Passage(IDS)], weights.take("model.embed_tokens.weight", spec.vocab_size, spec.hidden))
    for index in range(spec.layers):
        stream.advance(Held(weights), index, {})
    model = load(folder, load_format="dummy", dtype=torch.float32)
    expected = Bench(model).logits(IDS)
    found = model._head(model._norm(stream.states_WNI[0]))  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_of_which_the_text_makes_no_numbers_is_named(stories260k: Path) -> None:
    """By the matrix that is given them, or by the layer that gives them."""
    spec = ModelSpec.from_config(read_config(stories260k))
    states = torch.full((1, 8, spec.hidden), float("nan"))
    with open_checkpoint(stories260k, **FLOAT32) as checkpoint:
        for method, message in (
            (Method.GPTQ, r"layers\.2\.self_attn\.q_proj, .*: the calibration text makes inputs that are not finite"),
            (Method.ABSMAX, r"model\.layers\.2 gives values that are not finite"),
        ):
            stream = Stream(spec, [Passage(IDS[:8])], states)
            wanted = choices(spec, 2, method, WeightFormat.INT4_G32)
            with pytest.raises(ConfigurationError, match=message):
                quantize_layer(stream, checkpoint, spec, 2, wanted, options=Options(), dtype=torch.float32)


def test_weights_that_are_not_finite_are_named(stories260k: Path) -> None:
    """With the matrix, whatever the method."""
    spec = ModelSpec.from_config(read_config(stories260k))

    class Broken(Dummy):
        def fill(self, name: str, out: Tensor) -> None:
            super().fill(name, out)
            if name == "model.layers.1.mlp.up_proj.weight":
                out[3, 3] = float("inf")

    wanted = choices(spec, 1, Method.MSE, WeightFormat.INT8)
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.up_proj: it holds weights that are not finite"):
        quantize_layer(None, Broken(**FLOAT32), spec, 1, wanted, options=Options(), dtype=torch.float32)


@pytest.fixture(scope="module")
def default_model(shared: Path) -> Iterator[tuple[Checkpoint, ModelSpec, Stream, Stream]]:
    """Its tensors, and what stands before its third layer: of a text to calibrate by, and of another one to judge by."""
    try:
        folder = models.resolve("smollm2-135m-instruct")
    except ConfigurationError as error:
        missing(f"no default model: {error}")
        raise
    spec = ModelSpec.from_config(read_config(folder))
    content = text_of(shared / "data" / "text" / "gsm8k_train.jsonl.gz")[:60_000]
    windows = windows_of(content, tokenizer_of(folder), length=256, most_tokens=10 * 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_checkpoint(folder, **FLOAT32) as checkpoint:
        with torch.inference_mode():
            table = checkpoint.take("model.embed_tokens.weight", spec.vocab_size, spec.hidden)
            streams = [Stream.begun(spec, part, table) for part in (windows[:8], windows[8:])]
            for stream in streams:
                for index in range(2):
                    stream.advance(Held(checkpoint), index, {})
        yield checkpoint, spec, *streams
    torch.set_num_threads(threads)


def output_error(
    default_model: tuple[Checkpoint, ModelSpec, Stream, Stream], method: Method, *formats: WeightFormat
) -> float:
    """Of the third layer, on text that it was not calibrated by: of what it adds."""
    checkpoint, spec, calibration, judging = default_model
    with torch.inference_mode():
        seen = Stream(spec, [Passage([0] * 256)] * 8, calibration.states_WNI)
        held, _, _ = quantize_layer(
            seen, checkpoint, spec, 2, choices(spec, 2, method, *formats), options=Options(), dtype=torch.bfloat16
        )
        ends = []
        for each in (Held(checkpoint), held):
            stream = Stream(spec, [Passage([0] * 256)] * 2, judging.states_WNI)
            stream.advance(each, 2, {})
            ends.append(stream.states_WNI)
    return float((ends[1] - ends[0]).norm() / (ends[0] - judging.states_WNI).norm())


def test_gptq_and_awq_are_nearer_than_rounding_to_the_nearest(
    default_model: tuple[Checkpoint, ModelSpec, Stream, Stream],
) -> None:
    """A layer of the default model in four bits, on text that it was not calibrated by."""
    formats = (WeightFormat.INT4_G128, WeightFormat.INT4_G64)
    nearest, awq, gptq = (
        output_error(default_model, method, *formats) for method in (Method.ABSMAX, Method.AWQ, Method.GPTQ)
    )
    assert awq < 0.85 * nearest
    assert gptq < 0.6 * nearest
