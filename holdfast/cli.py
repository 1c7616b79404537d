"""The `holdfast` command: chat, generate, resume, cancel, status, trace, dead, pull.

Exit codes: 0 done, 1 failed, 2 asked for what cannot be, 130 interrupted. What went wrong is one line on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported: its notes are not for people

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from holdfast import __version__, ids, rpc, timeline
from holdfast.bus import Bus
from holdfast.client import DEFAULT_ADDRESS, Answer, Client, Message, Options
from holdfast.dead import dead_letters
from holdfast.errors import ConfigurationError, HoldfastError, InvalidRequest, from_rpc_error
from holdfast.events import Accepted, Event, FinishReason, Resumed, Tokens
from holdfast.stopwatch import Stopwatch
from holdfast.trace import trace as trace_request
from holdfast.v1 import engine_pb2, engine_pb2_grpc, generation_pb2

ADDRESS_VARIABLE = "HOLDFAST_ADDRESS"

_HEALTH_SECONDS = 5.0

_PATIENCE_SECONDS = 3.0
"""How long a person may wait without being told what for."""

_NOT_READY = (
    "the gateway is not ready: it is starting or stopping, or it misses an engine, the log, the tokenizer or a reply partition "
    "(its /readyz says which)"
)

_LIMITS = {"chat": 1024, "generate": 256}
"""Most tokens of an answer where --max-tokens is not given, by command."""

_LOG = (
    ("kafka", "127.0.0.1:9092", "bootstrap servers of the log, host:port,host:port"),
    ("kafka-namespace", "", "what stands before the names of its topics"),
)
"""Where the log is: what a gateway is told, and by the same names."""

_MAX_NUMBER = 10**9
"""Of seconds, say: beyond, a deadline would be past the end of time for some library."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    try:
        _check_text(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(argv)
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


def _check_text(argv: Sequence[str]) -> None:
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the argument {argument!r} is not UTF-8 text") from error


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
    _add_options(verb, "chat")

    verb = _verb(verbs, "generate", generate, "let the model continue a text")
    verb.add_argument("prompt", help="the text; - reads it from standard input")
    verb.add_argument("--json", action="store_true", help="print every event as a line of JSON")
    verb.add_argument(
        "--no-cancel", action="store_true", help="let the request run on when this command is interrupted"
    )
    _add_options(verb, "generate")

    verb = _verb(verbs, "resume", resume, "go on with an answer where it stood, at any gateway of the mesh")
    verb.add_argument("cursor", help="as an event had it")
    verb.add_argument("--json", action="store_true", help="print every event as a line of JSON")

    verb = _verb(verbs, "cancel", cancel, "end a request, wherever it runs")
    verb.add_argument("request_id", nargs="?", default="", help="all requests of this id are meant")
    verb.add_argument("--cursor", default="", help="any cursor of the request, instead of its id: no other is meant")

    verb = _verb(verbs, "status", status, "say whether the gateway serves, and what it sees of the mesh")
    for service in ("tokenizer", "engine", "kvstore"):
        what = f"ask this {service} too, host:port (repeatable)"
        verb.add_argument(f"--{service}", action="append", default=[], metavar="ADDRESS", help=what)

    verb = _verb(
        verbs, "trace", trace, "tell a request's life, as the log has it: who owned it, and what of theirs counted"
    )
    verb.add_argument("request_id", nargs="?", default="")
    verb.add_argument(
        "--cursor", default="", help="a cursor of the request, which finds it at once; an id, all are looked through"
    )
    _add_log(verb)
    verb.add_argument("--json", action="store_true", help="print every event as a line of JSON")

    verb = _verb(verbs, "dead", dead, "list the requests that were given up, as engine after engine died of them")
    _add_log(verb)
    verb.add_argument("--json", action="store_true", help="print every dead letter as a line of JSON")

    verb = _verb(verbs, "pull", pull, "fetch a model, so that a later start finds it at once")
    verb.add_argument("model", help="a name known here, a GGUF file, or a hub id")
    return parser


def _verb(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run)
    _add_address(parser, default=argparse.SUPPRESS)
    return parser


def _add_address(parser: argparse.ArgumentParser, *, default: str) -> None:
    """The same flag before and after the command."""
    what = f"the gateway, host:port, or several with commas between (also by {ADDRESS_VARIABLE}; otherwise {DEFAULT_ADDRESS})"
    parser.add_argument("--address", default=default, help=what)


def _add_log(verb: argparse.ArgumentParser) -> None:
    """Where the log is, for what is read from there without a gateway."""
    for flag, default, what in _LOG:
        variable = f"HOLDFAST_GATEWAY_{flag.upper().replace('-', '_')}"
        verb.add_argument(f"--{flag}", default=os.environ.get(variable, default), help=f"{what} (also by {variable})")


def _add_options(verb: argparse.ArgumentParser, command: str) -> None:
    def add(flag: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
        verb.add_argument(flag, type=kind, metavar=metavar, help=text)

    verb.add_argument("--model", default="", help="by default the one that the mesh serves")
    limit = f"end after so many tokens; by default after {_LIMITS[command]}, or where the model's context ends"
    add("--max-tokens", _whole("--max-tokens", 1, 2**32 - 1), "N", limit)
    makers = "by default what the model's makers say (its generation_config.json), otherwise"
    add("--temperature", _number("--temperature"), "T", f"0 is greedy; {makers} 1")
    add("--top-k", _whole("--top-k", 0, 2**32 - 1), "K", f"of the K likeliest tokens, 0 for all; {makers} all")
    add("--top-p", _number("--top-p"), "P", f"of the likeliest tokens that together reach P; {makers} 1, all")
    seed = "the same answer for the same seed, as far as numerics allow; by default another one each time"
    add("--seed", _whole("--seed", 0, 2**64 - 1), "N", seed)
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    timeout = "end after this time, however far it is; by default never"
    add("--timeout", _number("--timeout"), "SECONDS", timeout)


def _whole(flag: str, least: int, most: int) -> Callable[[str], int]:
    """Reads a flag's value. What is wrong with it is said here: past this, it is a library that would."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise InvalidRequest(f"{flag} must be a whole number from {least} to {most}, not {text!r}")
        return value

    return read


def _number(flag: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= _MAX_NUMBER:
            raise InvalidRequest(f"{flag} must be a number from 0 to {_MAX_NUMBER}, not {text!r}")
        return value

    return read


async def _limited(ask: Callable[[Options, int | None], Awaitable[None]], options: Options, limit: int) -> None:
    """Asks with this limit where the options have none; where the context leaves less, with what it leaves. The limit
    that is not the user's own is also told to `ask`."""
    if options["max_tokens"] is not None:
        return await ask(options, None)
    try:
        await ask({**options, "max_tokens": limit}, limit)
    except InvalidRequest as error:
        if error.field != "stop.max_tokens":
            raise
        await ask(options, None)


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
    _expect_utf8()
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
        except UnicodeDecodeError as error:
            raise _not_text(error) from error
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

        async def ask(options: Options, limit: int | None) -> None:
            async with _waits_told(client) as came:
                _tell(await show(client.generate(messages=messages, **options), heard, limit=limit, came=came))

        try:
            await _limited(ask, self._options, _LIMITS["chat"])
        finally:
            if heard:
                self._messages = [*messages, {"role": "assistant", "content": "".join(heard)}]


# --- generate, cancel -------------------------------------------------------------------------------------------------


def generate(arguments: argparse.Namespace) -> int:
    """A continuation, as it grows."""
    prompt = _standard_input() if arguments.prompt == "-" else arguments.prompt

    async def stream() -> int:
        async with Client(arguments.address) as client:

            async def ask(options: Options, limit: int | None) -> None:
                answer = client.generate(prompt, cancel_on_exit=not arguments.no_cancel, **options)
                try:
                    if arguments.json:
                        await show_json(answer)
                    else:
                        async with _waits_told(client) as came:
                            _tell(await show(answer, limit=limit, came=came))
                except asyncio.CancelledError:
                    if arguments.no_cancel:
                        _tell_that_it_runs_on(answer)
                    raise

            await _limited(ask, _options(arguments), _LIMITS["generate"])
        return 0

    return asyncio.run(stream())


def _tell_that_it_runs_on(answer: Answer) -> None:
    ways = [f"`holdfast cancel {answer.request_id}` ends it"]
    if answer.cursor:
        ways.append(f"`holdfast resume {answer.cursor}` goes on with it")
    print(f"\n{answer.request_id} runs on; {', '.join(ways)}", file=sys.stderr, end="")


def resume(arguments: argparse.Namespace) -> int:
    """The rest of an answer, as it grows."""

    async def stream() -> int:
        async with Client(arguments.address) as client:
            answer = client.resume(arguments.cursor)
            try:
                if arguments.json:
                    await show_json(answer)
                else:
                    async with _waits_told(client) as came:
                        _tell(await show(answer, came=came))
            except asyncio.CancelledError:
                _tell_that_it_runs_on(answer)
                raise
        return 0

    return asyncio.run(stream())


def _standard_input() -> str:
    _expect_utf8()
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise _not_text(error) from error


def _expect_utf8() -> None:
    """Some locales would let any bytes pass, as characters that no message can carry."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def _not_text(error: UnicodeDecodeError) -> InvalidRequest:
    return InvalidRequest(f"standard input is not UTF-8 text: byte {error.object[error.start]:#04x} is out of place")


async def show(
    answer: Answer,
    heard: list[str] | None = None,
    *,
    limit: int | None = None,
    came: Callable[[], object] = lambda: None,
) -> Stopwatch:
    """Prints the text of an answer as it grows, and returns how fast it came. `heard` gets each piece of text. An end
    at `limit` tokens is said to be one: nobody asked for it. `came` is called when there is some of the answer."""
    watch = Stopwatch()
    async with answer:
        async for event in answer:
            watch.see(event)
            if not isinstance(event, Accepted | Resumed):
                came()
            if isinstance(event, Tokens):
                print(event.text, end="", flush=True)
                if heard is not None:
                    heard.append(event.text)
            else:
                _warn_of(event, limit)
    print(flush=True)
    return watch


@contextlib.asynccontextmanager
async def _waits_told(client: Client) -> AsyncIterator[Callable[[], object]]:
    """Where nothing comes for a while, and the gateway says that it is not ready, so is whoever waits. The block calls
    what it is given when something has come."""

    async def tell() -> None:
        await asyncio.sleep(_PATIENCE_SECONDS)
        try:
            reason = "" if await client.health() else _NOT_READY
        except HoldfastError as error:
            reason = str(error)
        if reason:
            print(f"holdfast: waiting: {reason}", file=sys.stderr)

    telling = asyncio.create_task(tell())
    try:
        yield telling.cancel
    finally:
        telling.cancel()
        await asyncio.wait([telling])


def _tell(watch: Stopwatch) -> None:
    if sys.stderr.isatty():
        print(f"[{watch}]", file=sys.stderr)


def _warn_of(event: Event, limit: int | None) -> None:
    why = {
        FinishReason.CANCELLED: "somebody cancelled it",
        FinishReason.DEADLINE: "its time was over",
        FinishReason.LENGTH: limit and f"it has {limit} tokens, and --max-tokens allows more",
    }.get(getattr(event, "reason", FinishReason.STOP))
    if why:
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
            await client.cancel(arguments.request_id, cursor=arguments.cursor)

    asyncio.run(wish())
    print(f"{arguments.request_id or 'the request of that cursor'}: the mesh was told to end it")
    return 0


# --- status -----------------------------------------------------------------------------------------------------------


def status(arguments: argparse.Namespace) -> int:
    """What the gateway says of itself and of what it needs, and what each service says whose address was given; 1 if one
    of them does not serve."""

    async def ask() -> list[bool]:
        serving = [await _gateway_status(arguments.address)]
        for service in ("tokenizer", "engine", "kvstore"):
            serving += [await _service_status(service, address) for address in getattr(arguments, service)]
        return serving

    return 0 if all(asyncio.run(ask())) else 1


async def _gateway_status(address: str) -> bool:
    async with Client(address, timeout=_HEALTH_SECONDS) as client:
        try:
            serving, needs = await client.health(), await client.needs()
            models = await client.models() if serving else []
        except HoldfastError as error:
            _report("gateway", address, f"not serving: {error}")
            return False
    missing = ", ".join(need for need, there in needs.items() if not there)
    why = f"it misses: {missing}" if missing else "it is starting or stopping, or misses a reply partition"
    _report("gateway", address, "serving" if serving else f"not serving: {why} (its /readyz says why)")
    print(f"{'':11}it sees: {', '.join(need for need, there in needs.items() if there) or 'nothing that it needs'}")
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


# --- trace ------------------------------------------------------------------------------------------------------------


def trace(arguments: argparse.Namespace) -> int:
    """A request's life, an event a line."""
    if bool(arguments.request_id) == bool(arguments.cursor):
        raise InvalidRequest(f"name a request by its id, or by --cursor{', not by both' if arguments.cursor else ''}")

    async def read() -> list[timeline.Event]:
        async with _log("trace", arguments) as bus:
            return await trace_request(
                bus, arguments.request_id, cursor=arguments.cursor, tell=lambda line: print(line, file=sys.stderr)
            )

    show_timeline(asyncio.run(read()), as_json=arguments.json)
    return 0


def show_timeline(events: Sequence[timeline.Event], *, as_json: bool) -> None:
    """Prints events: when, how long after the first one, and what."""
    for event in events:
        if as_json:
            fields = {"event": event.kind.value, "at": event.at.isoformat(timespec="milliseconds"), **event.facts}
            print(json.dumps(fields, ensure_ascii=False))
        else:
            after = (event.at_ms - events[0].at_ms) / 1000
            print(
                f"{event.at:%Y-%m-%d %H:%M:%S}.{event.at_ms % 1000:03} {after:+9.3f} s  {event.kind.value:9} {event.what}"
            )


def _log(command: str, arguments: argparse.Namespace) -> contextlib.AbstractAsyncContextManager[Bus]:
    """The log that the flags name."""
    try:
        from holdfast.kafka import KafkaBus
    except ImportError as error:
        raise ConfigurationError(
            f"{command} needs more than the client: pip install 'holdfast[service]' ({error})"
        ) from error
    return KafkaBus(arguments.kafka, client_id=command, namespace=arguments.kafka_namespace)


# --- dead -------------------------------------------------------------------------------------------------------------


def dead(arguments: argparse.Namespace) -> int:
    """The dead letters that the log keeps, oldest first: when, which request, and why."""

    async def read() -> list[generation_pb2.DeadLetter]:
        async with _log("dead", arguments) as bus:
            return await dead_letters(bus)

    for letter in asyncio.run(read()):
        if arguments.json:
            print(json_format.MessageToJson(letter, indent=None, preserving_proto_field_name=True))
        else:
            print(
                f"{letter.given_up_at.ToDatetime():%Y-%m-%d %H:%M:%S}  {ids.of_client(letter.request_id)}: {letter.reason}"
            )
    return 0


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
