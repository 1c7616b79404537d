"""From a request in the log to the sequences that answer it; everything that an engine cannot honour is refused here.

The gateway has checked all of this before. An engine checks again, because a record may come from another version, and
because one bad row would end the step, and with it the engine, for everybody.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.errors import InvalidRequest, NotFound
from holdfast.v1 import generation_pb2 as pb
from services.engine.sequence import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS, SamplingParams, Sequence, StopRules

MAX_CHOICES = 128

_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 10.0),
}
_NOT_ZERO = {"top_p", "repetition_penalty"}


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine serves."""

    model: str
    context_length: int
    """Most tokens of prompt and answer together."""
    vocab_size: int
    stop_token_ids: frozenset[int]
    """The model's end-of-sequence tokens."""


def deadline_of(request: pb.GenerationRequest) -> float | None:
    """Seconds since the epoch; None where it may take for ever."""
    return request.deadline.seconds + request.deadline.nanos / 1e9 if request.HasField("deadline") else None


def sequences_of(
    request: pb.GenerationRequest, served: Served, *, interactive: bool, arrival: float
) -> tuple[Sequence, ...]:
    """One sequence for each choice.

    Raises:
        InvalidRequest: a field has a value that it may not have.
        NotFound: another model is meant.
    """
    _check(request, served)
    sampling, stop = _sampling(request.sampling), _stop(request, served)
    prompt_ids = tuple(request.prompt_token_ids)
    sequences: list[Sequence] = []
    for choice in range(request.num_choices):
        sequences.append(
            Sequence(
                request_id=request.request_id,
                choice=choice,
                prompt_ids=prompt_ids,
                sampling=sampling,
                stop=stop,
                interactive=interactive,
                arrival=arrival,
                deadline=deadline_of(request),
                shares_prompt_with=sequences[0] if choice else None,
            )
        )
    return tuple(sequences)


def _check(request: pb.GenerationRequest, served: Served) -> None:
    if request.model != served.model:
        raise NotFound(f"this engine serves {served.model!r}, not {request.model!r}")
    if request.grammar:
        raise InvalidRequest("this engine cannot follow a grammar", field="grammar")
    if not 1 <= request.num_choices <= MAX_CHOICES:
        raise _wrong("num_choices", request.num_choices, f"must be 1 to {MAX_CHOICES}")
    if not 1 <= len(request.prompt_token_ids) < served.context_length:
        raise _wrong(
            "prompt_token_ids",
            f"{len(request.prompt_token_ids)} tokens",
            f"must have 1 to {served.context_length - 1} tokens, for the context is {served.context_length}",
        )
    _check_ids("prompt_token_ids", max(request.prompt_token_ids), served)
    _check_sampling(request.sampling, served)
    _check_stop(request.stop, served)


def _check_sampling(sampling: pb.SamplingParams, served: Served) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(sampling, name)
        good = low <= value <= high and not (value == 0 and name in _NOT_ZERO)  # never true of NaN
        if sampling.HasField(name) and not good:  # type: ignore[arg-type]  # a field's name, as data
            above = "above" if name in _NOT_ZERO else "from"
            raise _wrong(f"sampling.{name}", f"{value:g}", f"must be {above} {low:g} to {high:g}")
    if sampling.HasField("top_k") and sampling.top_k < 1:
        raise _wrong("sampling.top_k", sampling.top_k, "must be at least 1")
    if sampling.HasField("logprobs") and sampling.logprobs > MAX_LOGPROBS:
        raise _wrong("sampling.logprobs", sampling.logprobs, f"must be 0 to {MAX_LOGPROBS}")
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise _wrong("sampling.logit_bias", f"{len(sampling.logit_bias)} entries", f"may have at most {MAX_LOGIT_BIAS}")
    _check_ids("sampling.logit_bias", max(sampling.logit_bias, default=0), served)
    for bias in sampling.logit_bias.values():
        if not -100 <= bias <= 100:
            raise _wrong("sampling.logit_bias", f"{bias:g}", "must be from -100 to 100")


def _check_stop(stop: pb.StopRules, served: Served) -> None:
    if stop.HasField("max_tokens") and stop.max_tokens < 1:
        raise _wrong("stop.max_tokens", stop.max_tokens, "must be at least 1")
    if (number := len({*stop.stop_token_ids, *served.stop_token_ids})) > MAX_STOP_TOKENS:
        right = f"may have at most {MAX_STOP_TOKENS} ids, those of the model among them"
        raise _wrong("stop.stop_token_ids", number, right)
    _check_ids("stop.stop_token_ids", max(stop.stop_token_ids, default=0), served)


def _check_ids(field: str, largest: int, served: Served) -> None:
    if largest >= served.vocab_size:
        raise _wrong(field, largest, f"must be below {served.vocab_size}, the vocabulary of {served.model}")


def _wrong(field: str, given: object, right: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {right}, not {given}", field=field)


def _sampling(sampling: pb.SamplingParams) -> SamplingParams:
    default = SamplingParams()
    return SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else default.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else default.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else default.repetition_penalty
        ),
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        seed=sampling.seed,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def _stop(request: pb.GenerationRequest, served: Served) -> StopRules:
    """The rules, max_tokens cut to what the context leaves."""
    stop, room = request.stop, served.context_length - len(request.prompt_token_ids)
    own = frozenset() if stop.ignore_eos else served.stop_token_ids
    return StopRules(
        max_tokens=min(stop.max_tokens, room) if stop.HasField("max_tokens") else room,
        min_tokens=stop.min_tokens,
        stop_token_ids=own | frozenset(stop.stop_token_ids),
    )
