"""What a model is, read from the `config.json` of its folder.

A `ModelSpec` holds what the native decoder needs to know of the six families it covers, so that nothing else reads a
config. The older spelling (`rope_theta`, `rope_scaling`, `torch_dtype`) and the newer one (`rope_parameters`, `dtype`)
are both understood. A key that is absent means what transformers takes it to mean for that family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigurationError
from services.engine.layers.rotary import LinearScaling, Llama3Scaling, RotarySpec, YarnScaling
from services.engine.strict_json import object_of

Config = Mapping[str, Any]
"""The content of a `config.json`."""


class NotCovered(ConfigurationError):
    """The native decoder does not compute this model; transformers' own code may."""


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of experts in place of the MLP."""

    num_experts: int
    top_k: int
    intermediate: int
    normalize: bool
    """Whether the weights of the chosen experts are made to add up to one."""
    layers: frozenset[int]
    """The layers that have it; the others have an MLP."""
    name: str
    """Of the block in the checkpoint."""
    expert_names: tuple[str, str, str]
    """Of an expert's gate, up and down matrices."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder that the native code computes."""

    architecture: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rotary: RotarySpec
    windows: tuple[int | None, ...]
    """For each layer how many tokens, itself included, a token sees; None for all before it."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normed before it is turned."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    """Whether the head is the embedding's matrix."""
    moe: MoESpec | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden",
            "intermediate",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"config.json: {name} is {getattr(self, name)}, but must be positive")
        if self.heads % self.kv_heads:
            raise ConfigurationError(
                f"config.json: {self.heads} attention heads cannot share {self.kv_heads} key-value heads evenly"
            )
        if self.head_dim % 2:
            raise ConfigurationError(f"config.json: a head of {self.head_dim} features has no halves to turn")
        assert len(self.windows) == self.layers

    @property
    def num_parameters(self) -> int:
        """Numbers that the model has, those that it uses twice counted once."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys) + 2 * self.head_dim * self.qk_norm
        attention += (queries + 2 * keys) * self.qkv_bias + self.hidden * self.o_bias
        mlp = 3 * self.hidden * self.intermediate + (2 * self.intermediate + self.hidden) * self.mlp_bias
        mixtures = 0 if self.moe is None else len(self.moe.layers)
        total = self.layers * (attention + 2 * self.hidden) + (self.layers - mixtures) * mlp
        if self.moe is not None:
            total += mixtures * self.moe.num_experts * self.hidden * (3 * self.moe.intermediate + 1)
        return total + self.hidden + self.vocab_size * self.hidden * (1 if self.tied else 2)

    @classmethod
    def from_config(cls, config: Config) -> ModelSpec:
        """The spec of a config. Raises `NotCovered` where another implementation may serve the model, and
        `ConfigurationError` where the config itself is wrong."""
        architecture = architecture_of(config)
        family = FAMILIES.get(architecture)
        if family is None:
            raise NotCovered(f"{architecture} is not among the natively computed {', '.join(sorted(FAMILIES))}")
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise NotCovered(f"{architecture} with hidden_act {activation!r}; natively only silu is computed")
        return family(config)


def read_config(folder: Path) -> Config:
    """The `config.json` of a model folder. Raises `ConfigurationError` where there is none, or it is no JSON object."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise ConfigurationError(f"{folder} is no model folder: it has no config.json")
    return config


def eos_token_ids(folder: Path) -> frozenset[int]:
    """The tokens that end an answer: what generation_config.json says, or else config.json; empty where neither does."""
    for name in ("generation_config.json", "config.json"):
        ids = (_read_json(folder / name) or {}).get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def architecture_of(config: Config) -> str:
    """The one class that a config says the model is."""
    match config.get("architectures"):
        case [str(architecture), *_]:
            return architecture
        case _:
            raise ConfigurationError("config.json names no model class under 'architectures'")


def _read_json(path: Path) -> Config | None:
    if not path.is_file():
        return None
    try:
        return object_of(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{path} cannot be read as a JSON object: {error}") from error


# The families. What is not mentioned is as `ModelSpec` has it by default.


def _llama(config: Config) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    return _spec(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Config) -> ModelSpec:
    return _spec(config, default_kv_heads=8, windows=_everywhere(config, config.get("sliding_window", 4096)))


def _mixtral(config: Config) -> ModelSpec:
    moe = MoESpec(
        num_experts=config.get("num_local_experts", 8),
        top_k=config.get("num_experts_per_tok", 2),
        intermediate=_required(config, "intermediate_size"),
        normalize=True,
        layers=frozenset(range(_required(config, "num_hidden_layers"))),
        name="block_sparse_moe",
        expert_names=("w1", "w3", "w2"),
    )
    windows = _everywhere(config, config.get("sliding_window"))
    return _spec(config, default_kv_heads=8, default_theta=1e6, default_eps=1e-5, windows=windows, moe=moe)


def _qwen2(config: Config) -> ModelSpec:
    return _spec(config, qkv_bias=True, windows=_late_layers(config))


def _qwen3(config: Config) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    return _spec(config, default_head_dim=128, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=_late_layers(config))


def _qwen3_moe(config: Config) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(_required(config, "num_hidden_layers"))
    moe = MoESpec(
        num_experts=config.get("num_experts", config.get("num_local_experts", 128)),
        top_k=config.get("num_experts_per_tok", 8),
        intermediate=config.get("moe_intermediate_size", 768),
        normalize=bool(config.get("norm_topk_prob", False)),
        layers=frozenset(layer for layer in layers if layer not in dense and (layer + 1) % step == 0),
        name="mlp",
        expert_names=("gate_proj", "up_proj", "down_proj"),
    )
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return _spec(
        config,
        default_kv_heads=4,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        windows=_everywhere(config, window),
        moe=moe,
    )


FAMILIES: Mapping[str, Callable[[Config], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}


def _spec(
    config: Config,
    *,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    default_theta: float = 1e4,
    default_eps: float = 1e-6,
    windows: tuple[int | None, ...] | None = None,
    moe: MoESpec | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
) -> ModelSpec:
    """What all families spell alike."""
    hidden, heads = _required(config, "hidden_size"), _required(config, "num_attention_heads")
    head_dim = config.get("head_dim") or default_head_dim or hidden // heads
    max_positions = config.get("max_position_embeddings", 2048)
    return ModelSpec(
        architecture=architecture_of(config),
        vocab_size=_required(config, "vocab_size"),
        hidden=hidden,
        intermediate=_required(config, "intermediate_size"),
        layers=_required(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or default_kv_heads or heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=config.get("rms_norm_eps", default_eps),
        rotary=_rotary(config, dim=head_dim, max_positions=max_positions, default_theta=default_theta),
        windows=windows or _everywhere(config, None),
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        tied=bool(config.get("tie_word_embeddings", False)),
        moe=moe,
    )


def _required(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ConfigurationError(f"config.json: {key} must be a whole number, not {value!r}")
    return value


def _everywhere(config: Config, window: int | None) -> tuple[int | None, ...]:
    return (window,) * _required(config, "num_hidden_layers")


def _late_layers(config: Config) -> tuple[int | None, ...]:
    """Qwen's windows: in the layers that `layer_types` names, or else from `max_window_layers` on."""
    layers = _required(config, "num_hidden_layers")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if len(types) != layers:
        raise ConfigurationError(f"config.json: layer_types names {len(types)} layers, but there are {layers}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rotary(config: Config, *, dim: int, max_positions: int, default_theta: float) -> RotarySpec:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or default_theta)
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        raise NotCovered(f"partial_rotary_factor {partial}; natively a head is turned as a whole")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    reader = _SCALINGS.get(kind)
    if reader is None:
        raise NotCovered(f"rope type {kind!r}; natively there are {', '.join(_SCALINGS)}")
    try:
        return RotarySpec(theta=theta, dim=dim, scaling=reader(rope, max_positions))
    except KeyError as error:
        raise ConfigurationError(f"config.json: rope type {kind!r} needs {error}") from error


def _yarn(rope: Config, max_positions: int) -> YarnScaling:
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_positions / original
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
        else:
            attention_factor = _yarn_mscale(factor)
    return YarnScaling(
        factor=factor,
        original_positions=original,
        beta_fast=rope.get("beta_fast") or 32,
        beta_slow=rope.get("beta_slow") or 1,
        attention_factor=attention_factor,
        truncate=rope.get("truncate", True),
    )


def _yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Peng et al. 2023, "YaRN", equation 22, with DeepSeek's multiplier."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(rope: Config, max_positions: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_positions=rope["original_max_position_embeddings"],
    )


_SCALINGS: Mapping[str, Callable[[Config, int], LinearScaling | Llama3Scaling | YarnScaling | None]] = {
    "default": lambda rope, max_positions: None,
    "linear": lambda rope, max_positions: LinearScaling(rope["factor"]),
    "llama3": _llama3,
    "yarn": _yarn,
}
