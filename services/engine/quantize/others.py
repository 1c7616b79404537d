"""Which other systems read what is written.

What transformers 5.23 with compressed-tensors 0.20 reads was tried (`tests/engine/quantize/test_checkpoint.py`); what vLLM 0.26 reads follows
from its source (`layers/quantization/compressed_tensors`), for a GPU of NVIDIA's.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.engine.quant.matrix import Scheme
from services.engine.quantize.compressed_tensors import config_of
from services.engine.quantize.plan import Plan

_BLOCK = 128


def who_else_reads(plan: Plan) -> str:
    """In a line: which of them read the checkpoint, and why the others do not."""
    obstacles = {"transformers": _to_transformers(plan), "vLLM": _to_vllm(plan)}
    readers = [name for name, why in obstacles.items() if why is None]
    who = {0: "this engine alone reads it as it comes", 2: "transformers and vLLM read it"}
    reasons = [f"not {name}: {why}" for name, why in obstacles.items() if why is not None]
    return "; ".join([who.get(len(readers)) or f"{readers[0]} reads it", *reasons])


def _to_transformers(plan: Plan) -> str | None:
    """What keeps transformers from loading it as it comes; None: nothing does."""
    if plan.spec.moe is not None:
        return "it takes the experts of a mixture to be quantized too"
    why = None
    if plan.embedding.quantizes and plan.embedding.scheme.bits < 8:
        why = "it loads an embedding with eight bits or none quantized"
    if any(not scheme.symmetric for scheme in _schemes(plan)):
        why = "it loads no zero points"
    if any(inputs % _BLOCK for inputs, _ in _in_blocks(plan)):
        why = f"inputs that have a scale for each block are no multiple of {_BLOCK}"
    if why is not None and len(config_of(plan.names(), others=())["config_groups"]) == 1:
        why += ", unless it unpacks all, with CompressedTensorsConfig(dequantize=True)"
    return why


def _to_vllm(plan: Plan) -> str | None:
    """What keeps vLLM from loading it; None: nothing does."""
    if plan.embedding.quantizes and (plan.embedding.scheme.bits == 8 or not plan.embedding.scheme.symmetric):
        return "of an embedding it reads packed values without zero points, and eight bits are not packed here, for transformers"
    if any(scheme.bits == 3 for scheme in _schemes(plan)):
        return "it has no kernel of its own for three bits"
    for inputs, outputs in _in_blocks(plan):
        if inputs % _BLOCK or any(size % _BLOCK for size in outputs[:-1]):
            return f"inputs that have a scale for each block, or outputs of what it keeps as one, are no multiple of {_BLOCK}"
    return None


def _schemes(plan: Plan) -> Iterator[Scheme]:
    """By which matrices are rounded."""
    return (format.scheme for _, format in plan.names() if format.scheme is not None)


def _in_blocks(plan: Plan) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Inputs and outputs of matrices with a scale for each block."""
    for choice in (choice for layer in plan.layers for choice in layer):
        if choice.quantizes and choice.scheme.tile == (_BLOCK, _BLOCK):
            yield choice.sharing.inputs, choice.sharing.outputs
    if plan.head.quantizes and plan.head.scheme.tile == (_BLOCK, _BLOCK):
        yield plan.spec.hidden, (plan.spec.vocab_size,)
