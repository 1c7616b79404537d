"""Any other decoder, computed by transformers' own modelling code over our cache.

transformers lets a model's attention be replaced by name. Ours is one function: it writes the keys and values that the
model computed into the paged cache and attends through `ops.attention`, whatever the batch holds. The step's batch
reaches it as an extra keyword that modelling code passes on untouched.

What a layer may see, transformers expresses in masks, which we never build. So a new model is first run on two tokens
with masks that know what they mean (`_Probe`): that tells each layer's window and the shape of its keys and values, and
refuses whatever is not plain causal attention over all layers.

Shapes: as in `ops.attention`; U for the batch dimension of one that transformers wants around everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from holdfast.errors import ConfigurationError
from services.engine.kv_cache import KVCache, KVShape
from services.engine.ops import attention
from services.engine.weights import Weights

if TYPE_CHECKING:
    from services.engine.state import Batch

NAME = "holdfast"
"""Under which transformers knows our attention."""

# What transformers hands to every attention function and what changes nothing of what ours computes.
_HARMLESS = frozenset(
    {
        "dropout",
        "scaling",
        "sliding_window",
        "softcap",
        "s_aux",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "is_causal",
        "logits_to_keep",
        "position_embeddings",
        "holdfast",
    }
)


@dataclass(slots=True)
class _Step:
    """One forward, as the attention function sees it. Layers are counted as they call."""

    plan: attention.AttentionPlan
    cache: KVCache
    windows: tuple[int | None, ...]
    next_layer: int = 0


class TransformersDecoder:
    """A causal language model of transformers."""

    def __init__(self, model: transformers.PreTrainedModel, *, dtype: torch.dtype) -> None:
        model.train(False)
        self._model = model
        config = model.config.get_text_config(decoder=True)
        probe = _Probe.run(model, name=type(model).__name__)
        self._windows = probe.windows
        self.kv_shape = KVShape(len(probe.windows), probe.kv_heads, probe.head_dim, dtype)
        self.vocab_size: int = config.vocab_size
        self.max_positions = _max_positions(config)

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype, device: torch.device) -> TransformersDecoder:
        """The model of a folder with weights."""
        _check_class(folder)
        _register()
        try:
            model, report = _auto().from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=NAME,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigurationError(f"transformers cannot load {folder}: {error}") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := report[what]:
                raise ConfigurationError(f"{folder}: {what.replace('_keys', '')} tensors: {sorted(map(str, names))}")
        return cls(model.to(device), dtype=dtype)

    @classmethod
    def dummy(cls, folder: Path, weights: Weights) -> TransformersDecoder:
        """The model of a config, filled from `weights`."""
        config = _check_class(folder)
        _register()
        with torch.device(weights.device):
            model = _auto().from_config(config, dtype=weights.dtype, attn_implementation=NAME)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.take(name, *parameter.shape))
        return cls(model, dtype=weights.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """The float32 logits of the rows to sample, [R, V]. Writes the keys and values of the batch's tokens."""
        step = _Step(attention.plan(batch, cache), cache, self._windows)
        output = self._model(
            input_ids=batch.token_ids_N[None],
            position_ids=batch.positions_N[None],
            use_cache=False,
            logits_to_keep=batch.sample_rows_R,
            holdfast=step,
        )
        assert step.next_layer == len(self._windows), f"{step.next_layer} of {len(self._windows)} layers attended"
        logits_RV: Tensor = output.logits[0]
        return logits_RV.float()


def _attend(
    module: nn.Module,
    q_UHND: Tensor,
    k_UKND: Tensor,
    v_UKND: Tensor,
    attention_mask: Tensor | None,
    *,
    holdfast: _Step | _Probe,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: [U, H, N, D] in, [U, N, H, D] out."""
    if isinstance(holdfast, _Probe):
        holdfast.see(q_UHND, k_UKND, v_UKND, attention_mask, others)
        return torch.zeros_like(q_UHND.transpose(1, 2)[..., : v_UKND.shape[-1]]), None
    layer, holdfast.next_layer = holdfast.next_layer, holdfast.next_layer + 1
    cache, plan = holdfast.cache, holdfast.plan
    q_NHD, k_NKD, v_NKE = (x[0].transpose(0, 1) for x in (q_UHND, k_UKND, v_UKND))
    head_dim, value_dim = q_NHD.shape[-1], v_NKE.shape[-1]
    # Where values are narrower than keys (DeepSeek's latent attention), the rest of their row is empty.
    v_NKD = F.pad(v_NKE, (0, head_dim - value_dim)) if value_dim < head_dim else v_NKE
    cache.write(layer, torch.stack((k_NKD, v_NKD), dim=1), plan.slots)
    out_NHD = attention.paged_attention(
        q_NHD.contiguous(),
        cache,
        layer,
        plan,
        scale=head_dim**-0.5 if scaling is None else scaling,
        window=holdfast.windows[layer],
        softcap=softcap,
        sinks_H=s_aux,
    )
    return out_NHD[None, ..., :value_dim], None


class _Probe:
    """What a model does in its attention layers, seen once."""

    TOKENS = 2

    def __init__(self, name: str) -> None:
        self._name = name
        self._masks: list[tuple[Tensor, int | None]] = []
        self._shapes: set[tuple[int, int]] = set()
        self.windows: tuple[int | None, ...] = ()

    @classmethod
    @torch.inference_mode()
    def run(cls, model: transformers.PreTrainedModel, *, name: str) -> _Probe:
        probe = cls(name)
        transformers.AttentionMaskInterface.register(NAME, probe.mask)
        try:
            ids = torch.zeros((1, cls.TOKENS), dtype=torch.long, device=model.device)
            positions = torch.arange(cls.TOKENS, device=model.device)[None]
            model(input_ids=ids, position_ids=positions, use_cache=False, holdfast=probe)
        except TypeError as error:
            raise probe.refusal(f"its modelling code does not pass our keyword on ({error})") from error
        finally:
            transformers.AttentionMaskInterface.register(NAME, _no_mask)
        if len(probe._shapes) != 1:
            raise probe.refusal(
                f"its layers keep keys of different shapes: {sorted(probe._shapes)} (heads, features)"
                if probe._shapes
                else "none of its layers attends"
            )
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if len(probe.windows) != num_layers:
            raise probe.refusal(
                f"{len(probe.windows)} of its {num_layers} layers attend; what the others keep is unknown"
            )
        return probe

    @property
    def kv_heads(self) -> int:
        return next(iter(self._shapes))[0]

    @property
    def head_dim(self) -> int:
        return next(iter(self._shapes))[1]

    def refusal(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self._name} cannot be served: {why}")

    def mask(
        self,
        *,
        mask_function: Callable[..., Tensor],
        device: torch.device,
        local_size: int | None = None,
        **_: object,
    ) -> Tensor:
        """transformers' mask function: a mask that we know again, after finding out what it hides."""
        last = 2 * (local_size or 2)
        query, keys = torch.tensor(last), torch.arange(last + 2)
        seen = mask_function(torch.tensor(0), torch.tensor(0), query, keys)
        causal = keys <= query
        if torch.equal(seen.expand_as(causal), causal if local_size is None else causal & (keys > query - local_size)):
            mask = torch.zeros((1, 1, self.TOKENS, self.TOKENS), device=device)
            self._masks.append((mask, local_size))
            return mask
        raise self.refusal("it masks otherwise than causally or by a sliding window")

    def see(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, others: dict[str, Any]) -> None:
        """One attention layer's call."""
        unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
        if unknown:
            raise self.refusal(f"its attention needs {', '.join(unknown)}")
        if q.shape[2] != self.TOKENS or k.shape[2] != self.TOKENS:
            raise self.refusal("it attends to other tokens than its own")
        if q.shape[-1] != k.shape[-1] or v.shape[-1] > k.shape[-1]:
            raise self.refusal(f"queries, keys and values have {q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]} features")
        self._shapes.add((k.shape[1], k.shape[-1]))
        for known, window in self._masks:
            if mask is known:
                self.windows += (window,)
                return
        raise self.refusal("a layer's mask is none that transformers' mask functions make")


def _no_mask(**_: object) -> None:
    """While serving, what a layer may see is known from the probe."""


def _auto() -> Any:
    """transformers' table of causal language models, whose annotations promise less than it does."""
    return transformers.AutoModelForCausalLM


def _register() -> None:
    transformers.AttentionInterface.register(NAME, _attend)
    transformers.AttentionMaskInterface.register(NAME, _no_mask)


def _check_class(folder: Path) -> transformers.PreTrainedConfig:
    """The config as transformers reads it, if its model class lets its attention be replaced."""
    try:
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model_class: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"transformers knows no causal language model for {folder}: {error}") from error
    if not model_class._supports_attention_backend:
        raise ConfigurationError(
            f"{model_class.__name__} cannot be served: transformers does not let its attention be replaced"
        )
    return config


def _max_positions(config: transformers.PreTrainedConfig) -> int:
    """Most tokens of a sequence. Rotary kinds whose angles depend on the longest sequence of a step stay below where
    that begins, since sequences of one step must not change one another."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return int(config.max_position_embeddings)
