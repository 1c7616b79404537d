"""What a request may say, over both faces: each refusal names its field and says what would be right."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from holdfast.errors import InvalidRequest, NotFound, from_rpc_error
from holdfast.ids import of_client
from holdfast.v1 import gateway_pb2 as pb
from holdfast.v1.generation_pb2 import SamplingParams, StopRules
from holdfast.v1.tokenizer_pb2 import ChatInput, ChatMessage, TokenIds
from tests.gateway.doubles import CONTEXT, MODEL, VOCABULARY, ByteTokenizer, Mesh, open_mesh

Case = tuple[str, dict[str, Any], str]
"""Field, what the request says, a part of what the refusal says."""

USER = ChatMessage(role="user", content="hi")


def sampling(field: str, value: Any, says: str) -> Case:
    return f"sampling.{field}", {"sampling": SamplingParams(**{field: value})}, says


def stop(field: str, value: Any, says: str) -> Case:
    return f"stop.{field}", {"stop": StopRules(**{field: value})}, says


def chat(field: str, value: ChatInput, says: str) -> Case:
    return field, {"chat": value}, says


BAD: list[Case] = [
    ("request_id", {"request_id": "a b"}, "1 to 128 characters"),
    ("request_id", {"request_id": "x" * 129}, "1 to 128 characters"),
    ("input", {"prompt": None}, "set one of prompt, chat and token_ids"),
    ("prompt", {"prompt": ""}, "at least one character"),
    ("prompt", {"prompt": "x" * 2001}, "2,001 bytes of text; this gateway takes at most 2,000"),
    ("input", {"prompt": "x" * CONTEXT}, f"a prompt may have at most {CONTEXT - 1}"),
    ("token_ids.ids", {"token_ids": TokenIds()}, "at least one token id"),
    ("token_ids.ids", {"token_ids": TokenIds(ids=[1, VOCABULARY])}, f"below {VOCABULARY}"),
    (
        "token_ids.ids",
        {"token_ids": TokenIds(ids=[VOCABULARY] * (CONTEXT + 1))},
        "513 token ids are more than the context",
    ),
    ("input", {"token_ids": TokenIds(ids=[1] * CONTEXT)}, "512 tokens"),
    ("chat.messages", {"chat": ChatInput(messages=[ChatMessage()] * 513)}, "513 messages are more"),
    chat("chat.messages", ChatInput(), "at least one message"),
    chat("chat.messages[1].role", ChatInput(messages=[USER, ChatMessage(content="hi")]), "needs a role"),
    chat(
        "chat.messages[0].fields_json",
        ChatInput(messages=[ChatMessage(role="user", fields_json="[1]")]),
        "must be a JSON object, not '[1]'",
    ),
    chat("chat.template_args_json", ChatInput(messages=[USER], template_args_json="{"), "must be a JSON object"),
    chat("chat.template_args_json", ChatInput(messages=[USER], template_args_json="[" * 100_000), "JSON object"),
    chat("chat.continue_final_message", ChatInput(messages=[USER], continue_final_message=True), "is of user"),
    chat("chat.messages", ChatInput(messages=[ChatMessage(role="user", content="x" * 3000)]), "3,004 bytes"),
    sampling("temperature", math.nan, "from 0 to 100, not nan"),
    sampling("temperature", math.inf, "not inf"),
    sampling("temperature", -0.1, "not -0.1"),
    sampling("temperature", 100.5, "not 100.5"),
    sampling("top_p", 0.0, "above 0 and at most 1, not 0"),
    sampling("top_p", 1.5, "not 1.5"),
    sampling("top_p", math.nan, "not nan"),
    sampling("min_p", -0.5, "from 0 to 1"),
    sampling("presence_penalty", 2.5, "from -2 to 2"),
    sampling("frequency_penalty", -3.0, "from -2 to 2"),
    sampling("repetition_penalty", 0.0, "above 0 and at most 10"),
    sampling("repetition_penalty", 11.0, "not 11"),
    sampling("logit_bias", {VOCABULARY: 1.0}, f"below {VOCABULARY}"),
    sampling("logit_bias", {1: 101.0}, "from -100 to 100, not 101 for token 1"),
    sampling("logit_bias", {1: math.nan}, "not nan"),
    sampling("logprobs", 21, "from 0 to 20"),
    stop("max_tokens", 0, "at least 1"),
    ("stop.max_tokens", {"stop": StopRules(max_tokens=CONTEXT - 1)}, f"at most {CONTEXT - 2} after this prompt"),
    ("stop.min_tokens", {"stop": StopRules(max_tokens=3, min_tokens=4)}, "at most max_tokens, 3"),
    stop("stop_token_ids", [VOCABULARY], f"below {VOCABULARY}"),
    stop("stop_token_ids", [VOCABULARY] * 1025, "at most 1024, not 1025 ids"),
    stop("stop", [""], "strings of 1 to 256"),
    stop("stop", ["x" * 257], "257 characters"),
    stop("stop", ["x"] * 17, "at most 16"),
    ("num_choices", {"num_choices": 0}, "from 1 to 128"),
    ("num_choices", {"num_choices": 129}, "from 1 to 128"),
    ("num_choices", {"num_choices": 9}, "at most 8 at this gateway"),
    ("request_class", {"request_class": 7}, "REQUEST_CLASS_INTERACTIVE"),
    ("timeout", {"timeout": {"seconds": 0}}, "above 0"),
    ("timeout", {"timeout": {"seconds": -1}}, "above 0"),
    ("timeout", {"timeout": {"seconds": 100_000}}, "at most 60 seconds"),
]


def request(changes: dict[str, Any]) -> pb.GenerateRequest:
    """A good request but for the changes."""
    values = {} if {"chat", "token_ids", "prompt"} & changes.keys() else {"prompt": "hi"}
    return pb.GenerateRequest(**(values | {name: value for name, value in changes.items() if value is not None}))


async def refusal(mesh: Mesh, wrong: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(mesh.stub.Generate(wrong)))
    return caught.value


async def test_every_bad_field_is_refused_by_name() -> None:
    """INVALID_ARGUMENT with BadRequest names the field, its text says what would be right, and nothing is published."""
    async with open_mesh(max_prompt_bytes=2000, max_choices=8, max_timeout_seconds=60) as mesh:
        for field, changes, says in BAD:
            error = await refusal(mesh, request(changes))
            ours = from_rpc_error(error)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (field, changes)
            assert isinstance(ours, InvalidRequest)
            assert ours.field == field, changes
            assert says in str(ours), changes
        accepted = await mesh.client.submit("good", request_id="good")
        assert of_client((await mesh.engine.job()).request.request_id) == accepted.request_id == "good"


async def test_too_many_biases_are_refused() -> None:
    """At most 1,024 tokens have a bias."""
    async with open_mesh() as mesh:
        wrong = request({"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))})
        ours = from_rpc_error(await refusal(mesh, wrong))
        assert isinstance(ours, InvalidRequest)
        assert (ours.field, "at most 1024" in str(ours)) == ("sampling.logit_bias", True)


async def test_the_edges_of_every_range_are_accepted() -> None:
    """What the contract allows at its edges goes to the log as it came."""
    edges = [
        SamplingParams(temperature=0, top_k=1, top_p=1, min_p=0, presence_penalty=-2, frequency_penalty=2, logprobs=0),
        SamplingParams(temperature=100, top_p=1e-6, min_p=1, repetition_penalty=10, logprobs=20, logit_bias={0: -100}),
    ]
    rules = StopRules(max_tokens=CONTEXT - 2, min_tokens=CONTEXT - 2, stop=["x" * 256] * 16, stop_token_ids=[257])
    async with open_mesh() as mesh:
        for edge, request_id in zip(edges, ("A_z.0:-", "x" * 128), strict=True):
            edge.seed = (1 << 64) - 1
            good = request({"sampling": edge, "stop": rules, "num_choices": 128, "request_id": request_id})
            await mesh.stub.Submit(pb.SubmitRequest(request=good))
            record = (await mesh.engine.job()).request
            assert (record.sampling, record.stop, record.num_choices) == (edge, rules, 128)


async def test_an_unknown_model_is_not_found_and_the_known_one_is_named() -> None:
    """NOT_FOUND says what there is."""
    async with open_mesh() as mesh:
        error = from_rpc_error(await refusal(mesh, request({"model": "gpt-9"})))
        assert isinstance(error, NotFound)
        assert "'gpt-9'" in str(error)
        assert repr(MODEL) in str(error)


async def test_a_longest_prompt_may_be_set() -> None:
    """A gateway may take shorter prompts than the model."""
    async with open_mesh(max_prompt_tokens=4) as mesh:
        error = from_rpc_error(await refusal(mesh, request({"prompt": "12345"})))
        assert isinstance(error, InvalidRequest)
        assert (error.field, str(error)) == ("input", "the prompt has 5 tokens; this gateway takes at most 4")


async def test_a_model_without_a_template_takes_no_conversation() -> None:
    """Chat is refused where the model has no chat template, and what would work is named."""
    tokenizer = ByteTokenizer(chat=False)
    async with open_mesh(tokenizer=tokenizer) as mesh:
        error = from_rpc_error(await refusal(mesh, request({"chat": ChatInput(messages=[USER])})))
        assert isinstance(error, InvalidRequest)
        assert (error.field, "prompt or token_ids" in str(error)) == ("chat", True)


@pytest.mark.parametrize(
    ("wrong", "theirs", "ours"),
    [
        (request({}), "texts[0]", "prompt"),
        (request({"chat": ChatInput(messages=[USER])}), "chat.messages[0]", "chat.messages[0]"),
        (request({"chat": ChatInput(messages=[USER])}), "", "chat"),
    ],
)
async def test_what_the_tokenizer_refuses_is_the_clients_fault(
    wrong: pb.GenerateRequest, theirs: str, ours: str
) -> None:
    """The tokenizer's refusal reaches the client under the name that the field has in its own request."""
    async with open_mesh(tokenizer=ByteTokenizer(refuse=InvalidRequest("bad template", field=theirs))) as mesh:
        error = from_rpc_error(await refusal(mesh, wrong))
        assert isinstance(error, InvalidRequest)
        assert (error.field, str(error)) == (ours, "bad template")
