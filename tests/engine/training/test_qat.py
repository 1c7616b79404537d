"""A model that computes with the weights that will be served, and trains those it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.errors import ConfigurationError
from services.engine.ops.forms import RowScaled
from services.engine.ops.quantize import by_torch
from services.engine.quant.qat import prepare, release
from services.engine.quant.rules import FORMATS, Rules
from services.engine.weight_format import WeightFormat

IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "int3-g32-asym", "int8-weight", "fp8", "fp8-tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_is_the_one_that_an_engine_would_serve(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """What a module multiplies with is what packing the plain matrix in that dtype keeps: in bfloat16 four bits, whose scales are in it, to the
    bit; the others as nearly as the kernel that they are read out by shows."""
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    formats = prepare(model, Rules(name), dtype=dtype)
    assert len(formats) == 14
    format = FORMATS[WeightFormat(name)]
    for key in formats:
        weight = plain[f"{key}.weight"].to(dtype)
        served = format.dequant(format.pack(weight, dtype=dtype), inputs=weight.shape[1])
        found = model.get_submodule(key).weight
        assert found.dtype is torch.float32 and not torch.equal(found.to(dtype), weight)
        if format.rounds_products and dtype is torch.bfloat16:
            assert torch.equal(found.to(dtype), served.to(dtype))
        else:
            torch.testing.assert_close(found, served, rtol=1e-6, atol=1e-7)


def test_gradients_pass_the_rounding_as_if_it_were_not_there() -> None:
    """The straight-through estimator: that of the weight is that of the rounded weight."""
    layer = nn.Sequential()
    layer.add_module("up_proj", nn.Linear(64, 8, bias=False))
    prepare(layer, Rules("*=int4-g32"), dtype=torch.float32)
    x = torch.randn(5, 64)
    target = torch.randn(5, 8)
    (layer(x) * target).sum().backward()
    (trained,) = layer.parameters()
    assert trained.grad is not None
    torch.testing.assert_close(trained.grad, target.T @ x)


def test_activations_of_eight_bits_are_rounded_row_by_row() -> None:
    """int8 multiplies rows in eight bits, so training does; their gradient passes too."""
    layer = nn.Sequential()
    layer.add_module("up_proj", nn.Linear(64, 8, bias=False))
    prepare(layer, Rules("*=int8"), dtype=torch.float32)
    x = torch.randn(2, 5, 64, requires_grad=True)
    values, scales = by_torch(x.detach().view(-1, 64), RowScaled(torch.int8))
    weight = layer.get_submodule("up_proj").weight
    expected = (values.float() * scales[:, None]).view(2, 5, 64) @ weight.T
    out = layer(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


def test_a_released_model_has_the_weights_that_were_trained(model: nn.Module) -> None:
    """And nothing is left of what was between them and their use: it answers as one that was never prepared."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unprepared = model(input_ids=IDS).logits
    prepare(model, Rules("int8"), dtype=torch.float32)
    assert not torch.equal(model(input_ids=IDS).logits, unprepared)
    release(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(input_ids=IDS).logits, unprepared)


def test_tied_matrices_stay_one(model: nn.Module) -> None:
    """Embedding and head are one parameter, rounded or not."""
    num_parameters = len(list(model.parameters()))
    prepare(model, Rules("*=int8-weight"), dtype=torch.float32)
    assert len(list(model.parameters())) == num_parameters
    assert torch.equal(model.get_submodule("lm_head").weight, model.get_submodule("model.embed_tokens").weight)
    release(model)
    assert model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("int4-g128", r"model\.layers\.0\.self_attn\.q_proj: int4-g128 keeps 128 inputs in a group, and there are 64"),
        ("*.q_proj=int8", "q_proj, .*k_proj, .*v_proj are kept as one matrix"),
        ("*.up_proj=int8", "gate_proj, .*up_proj are kept as one matrix"),
        ("int8-static", "calibration"),
        ("*.nothing=int8", "decides about no matrix"),
        ("*=fp8-block", r"rows of model\.embed_tokens are looked up"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(model: nn.Module, rules: str, message: str) -> None:
    """Before a single step."""
    with pytest.raises(ConfigurationError, match=message):
        prepare(model, Rules(rules), dtype=torch.float32)
