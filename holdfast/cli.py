"""The `holdfast` command: chat, generate, cancel, status, pull.

Exit codes: 0 done, 1 failed, 2 asked for what cannot be, 130 interrupted. What went wrong is one line on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported: its notes are not for people

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from holdfast import __version__, rpc
from holdfast.client import DEFAULT_ADDRESS, Answer, Client, Message, Options
from holdfast.errors import ConfigurationError, HoldfastError, InvalidRequest, from_rpc_error
from holdfast.events import Event, FinishReason, Tokens
from holdfast.stopwatch import Stopwatch
from holdfast.v1 import engine_pb2, engine_pb2_grpc

ADDRESS_VARIABLE = "HOLDFAST_ADDRESS"

_HEALTH_SECONDS = 5.0

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return int(code)
    except (InvalidRequest, ConfigurationError) as error:
        return _fail(error, code=2)
    except HoldfastError as error:
        return _fail(error, code=1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not meet the closed pipe again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(error: HoldfastError, *, code: int) -> int:
    field = error.field if isinstance(error, InvalidRequest) else ""
    print(f"holdfast: {field + ': ' if field else ''}{error}", file=sys.stderr)
    return code


# --- What can be asked for --------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="holdfast", description="Talk to a Holdfast mesh.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    _add_address(parser, default=os.environ.get(ADDRESS_VARIABLE, DEFAULT_ADDRESS))
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    verb = _verb(verbs, "chat", chat, "talk with the model; Ctrl-C stops an answer, Ctrl-D ends")
    verb.add_argument("message", nargs="?", help="say only this, and end with its answer")
    verb.add_argument("--system", help="what the model is told before the conversation")
    _add_options(verb)

    verb = _verb(verbs, "generate", generate, "let the model continue a text")
    verb.add_argument("prompt", help="the text; - reads it from standard input")
    verb.add_argument("--json", action="store_true", help="print every event as a line of JSON")
    verb.add_argument(
        "--no-cancel", action="store_true", help="let the request run on when this command is interrupted"
    )
    _add_options(verb)

    verb = _verb(verbs, "cancel", cancel, "end a request, wherever it runs")
    verb.add_argument("request_id")

    verb = _verb(verbs, "status", status, "say which services answer, and what they serve")
    for service in ("tokenizer", "engine", "kvstore"):
        what = f"ask this {service} too, host:port (repeatable)"
        verb.add_argument(f"--{service}", action="append", default=[], metavar="ADDRESS", help=what)

    verb = _verb(verbs, "pull", pull, "fetch a model, so that a later start finds it at once")
    verb.add_argument("model", help="a name known here, or a hub id")
    return parser


def _verb(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run)
    _add_address(parser, default=argparse.SUPPRESS)
    return parser


def _add_address(parser: argparse.ArgumentParser, *, default: str) -> None:
    """The same flag before and after the command."""
    what = f"the gateway, host:port (also by {ADDRESS_VARIABLE}; otherwise {DEFAULT_ADDRESS})"
    parser.add_argument("--address", default=default, help=what)


def _add_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", default="", help="by default the one that the mesh serves")
    verb.add_argument("--max-tokens", type=int, metavar="N", help="end after so many tokens")
    verb.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    verb.add_argument("--top-k", type=int, metavar="K")
    verb.add_argument("--top-p", type=float, metavar="P")
    verb.add_argument(
        "--seed", type=int, metavar="N", help="the same answer for the same seed, as far as numerics allow"
    )
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    verb.add_argument("--timeout", type=float, metavar="SECONDS", help="end after this time, however far it is")


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        timeout=arguments.timeout,
    )


# --- chat -------------------------------------------------------------------------------------------------------------


def chat(arguments: argparse.Namespace) -> int:
    """A conversation: of one turn with a message, else of as many as standard input has lines."""
    conversation = _Conversation(arguments.system, _options(arguments))
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        # One loop, running only while there is something to wait for: between turns the terminal belongs to the person.
        opened = contextlib.AsyncExitStack()
        stack.callback(lambda: runner.run(opened.aclose()))
        client = runner.run(opened.enter_async_context(Client(arguments.address)))
        if arguments.message is not None:
            runner.run(conversation.say(arguments.message, client))
        else:
            _talk(runner, client, conversation)
    return 0


def _talk(runner: asyncio.Runner, client: Client, conversation: _Conversation) -> None:
    at_terminal = sys.stdin.isatty()
    names = ", ".join(model.name for model in runner.run(client.models()))
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` line editing and history
        print(f"{names} at {client.address}. Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            message = input("> " if at_terminal else "")
        except EOFError:
            if at_terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)")
            continue
        if not message.strip():
            continue
        try:
            runner.run(conversation.say(message, client))
        except KeyboardInterrupt:
            print(" (stopped)")
        except HoldfastError as error:
            if not at_terminal:
                raise
            _fail(error, code=1)


class _Conversation:
    """What was said so far. A turn that got no answer leaves no trace; of one that was stopped, what was heard stays."""

    def __init__(self, system: str | None, options: Options) -> None:
        self._options = options
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    async def say(self, message: str, client: Client) -> None:
        """Says something and prints the answer as it grows."""
        messages: list[Message] = [*self._messages, {"role": "user", "content": message}]
        heard: list[str] = []
        try:
            _tell(await show(client.generate(messages=messages, **self._options), heard))
        finally:
            if heard:
                self._messages = [*messages, {"role": "assistant", "content": "".join(heard)}]


# --- generate, cancel -------------------------------------------------------------------------------------------------


def generate(arguments: argparse.Namespace) -> int:
    """A continuation, as it grows."""
    prompt = _standard_input() if arguments.prompt == "-" else arguments.prompt

    async def stream() -> int:
        async with Client(arguments.address) as client:
            answer = client.generate(prompt, cancel_on_exit=not arguments.no_cancel, **_options(arguments))
            try:
                if arguments.json:
                    await show_json(answer)
                else:
                    _tell(await show(answer))
            except asyncio.CancelledError:
                if arguments.no_cancel:
                    again = f"holdfast cancel {answer.request_id}"
                    print(f"\n{answer.request_id} runs on; `{again}` ends it", file=sys.stderr, end="")
                raise
        return 0

    return asyncio.run(stream())


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8 text: {error}") from error


async def show(answer: Answer, heard: list[str] | None = None) -> Stopwatch:
    """Prints the text of an answer as it grows, and returns how fast it came. `heard` gets each piece of text."""
    watch = Stopwatch()
    async with answer:
        async for event in answer:
            watch.see(event)
            if isinstance(event, Tokens):
                print(event.text, end="", flush=True)
                if heard is not None:
                    heard.append(event.text)
            else:
                _warn_of(event)
    print(flush=True)
    return watch


def _tell(watch: Stopwatch) -> None:
    if sys.stderr.isatty():
        print(f"[{watch}]", file=sys.stderr)


def _warn_of(event: Event) -> None:
    reason = getattr(event, "reason", None)
    if reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):
        why = "somebody cancelled it" if reason is FinishReason.CANCELLED else "its time was over"
        print(f"\nholdfast: the answer ended early: {why}", file=sys.stderr, end="")


async def show_json(answer: Answer) -> None:
    """Prints every event of an answer as a line of JSON, its kind as `event`."""
    async with answer:
        async for event in answer:
            fields = {"event": type(event).__name__.lower(), **dataclasses.asdict(event)}
            print(json.dumps(fields, default=lambda value: value.value, ensure_ascii=False), flush=True)


def cancel(arguments: argparse.Namespace) -> int:
    """The wish that a request end."""

    async def wish() -> None:
        async with Client(arguments.address) as client:
            await client.cancel(arguments.request_id)

    asyncio.run(wish())
    print(f"{arguments.request_id}: the mesh was told to end it")
    return 0


# --- status -----------------------------------------------------------------------------------------------------------


def status(arguments: argparse.Namespace) -> int:
    """One line for each service; 1 if one of them does not serve."""

    async def ask() -> list[bool]:
        serving = [await _gateway_status(arguments.address)]
        for service in ("tokenizer", "engine", "kvstore"):
            serving += [await _service_status(service, address) for address in getattr(arguments, service)]
        return serving

    return 0 if all(asyncio.run(ask())) else 1


async def _gateway_status(address: str) -> bool:
    async with Client(address, timeout=_HEALTH_SECONDS) as client:
        try:
            serving = await client.health()
            models = await client.models() if serving else []
        except HoldfastError as error:
            _report("gateway", address, f"not serving: {error}")
            return False
    _report("gateway", address, "serving" if serving else "not serving: it is starting or stopping")
    for model in models:
        print(f"{'':11}{model.name}: {model.context_length} tokens of context{', chat' if model.chat else ''}")
    return serving


async def _service_status(service: str, address: str) -> bool:
    async with rpc.channel(address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS
            )
            serving = bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
            _report(service, address, "serving" if serving else "not serving: it is starting or stopping")
            if serving and service == "engine":
                await _engine_status(channel)
        except grpc.RpcError as error:
            _report(service, address, f"not serving: {from_rpc_error(error)}")
            return False
    return serving


async def _engine_status(channel: grpc.aio.Channel) -> None:
    engine: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(channel)
    info = await engine.GetInfo(engine_pb2.GetInfoRequest(), timeout=_HEALTH_SECONDS)
    load = await engine.GetLoad(engine_pb2.GetLoadRequest(), timeout=_HEALTH_SECONDS)
    print(
        f"{'':11}{info.model} on {info.device} in {info.dtype}{', draining' if load.draining else ''}: "
        f"{load.num_running} of {info.max_sequences} sequences run, {load.num_waiting} wait; of {info.num_blocks} "
        f"blocks {load.num_active_blocks} are in use, {load.num_cached_blocks} kept, {load.num_free_blocks} free"
    )


def _report(service: str, address: str, state: str) -> None:
    print(f"{service:10} {address:21} {state}")


# --- pull -------------------------------------------------------------------------------------------------------------


def pull(arguments: argparse.Namespace) -> int:
    """Fetches a model and prints its folder."""
    try:
        from holdfast.models import resolve
    except ImportError as error:
        raise ConfigurationError(
            f"pull needs more than the client: pip install 'holdfast[models]' ({error})"
        ) from error
    print(resolve(arguments.model, progress=lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
