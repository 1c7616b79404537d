"""The `holdfast` command, as a program of its own, against a gateway that plays what each test gives it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest

from holdfast.cli import main
from holdfast.errors import InvalidRequest, NotFound
from holdfast.events import Finished, FinishReason, Tokens, Usage
from holdfast.stopwatch import Stopwatch
from holdfast.v1 import generation_pb2
from tests.holdfast.fake_gateway import FakeGateway, accepted, again, finished, resumed, serving, tokens

COMMAND = [sys.executable, "-m", "holdfast.cli"]


async def run(*arguments: str | bytes, stdin: str | bytes = "", **environment: str) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a whole run."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, err = await asyncio.wait_for(process.communicate(stdin.encode() if isinstance(stdin, str) else stdin), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


class Terminal:
    """A command at a terminal: what a person types and reads."""

    def __init__(self, master: int, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._master = master
        self._heard = b""

    async def read_until(self, text: str, *, seconds: float = 60) -> str:
        """What comes up to and with `text`. Raises TimeoutError where nothing comes for so long."""
        loop = asyncio.get_running_loop()
        while text.encode() not in self._heard:
            arrived: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._master, lambda future=arrived: future.done() or future.set_result(None))
            try:
                await asyncio.wait_for(arrived, seconds)
            finally:
                loop.remove_reader(self._master)
            self._heard += os.read(self._master, 65536)
        before, _, self._heard = self._heard.partition(text.encode())
        return before.decode() + text

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def interrupt_until(self, text: str) -> None:
        """Ctrl-C until `text` comes: Python's `input` does not hear one between writing its prompt and listening."""
        while True:
            self.process.send_signal(signal.SIGINT)
            with suppress(TimeoutError):
                await self.read_until(text, seconds=5)
                return


@contextmanager
def on_interrupt(handler: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@asynccontextmanager
async def terminal(*arguments: str) -> AsyncIterator[Terminal]:
    """A child ignores what its parent does, and tests in the background of a shell ignore Ctrl-C. So would a command there,
    and should; this one is somebody's at a terminal."""
    master, slave = pty.openpty()
    with on_interrupt(signal.default_int_handler):
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        os.close(master)


async def test_generate_prints_the_answer() -> None:
    """The text alone on standard output; nothing else where nobody watches."""
    gateway = FakeGateway([accepted(), tokens(0, " upon a"), tokens(1, " time"), finished()])
    async with serving(gateway) as server:
        options = [
            "--max-tokens",
            "9",
            "--temperature",
            "0",
            "--seed",
            "4",
            "--stop",
            "!",
            "--stop",
            "?",
            "--model",
            "m",
        ]
        answer = await run("--address", server.address, "generate", "Once", *options)
    assert answer == (0, " upon a time\n", "")
    (request,) = gateway.requests
    assert (request.prompt, request.model, request.stop.max_tokens) == ("Once", "m", 9)
    assert (request.sampling.temperature, request.sampling.seed, list(request.stop.stop)) == (0, 4, ["!", "?"])


async def test_generate_reads_standard_input_and_the_address_from_the_environment() -> None:
    """`-` and HOLDFAST_ADDRESS."""
    gateway = FakeGateway([accepted(), finished()])
    async with serving(gateway) as server:
        code, _, err = await run("generate", "-", "--no-cancel", stdin="Once\nmore", HOLDFAST_ADDRESS=server.address)
    assert (code, err) == (0, "")
    assert gateway.requests[0].prompt == "Once\nmore"
    assert not gateway.requests[0].cancel_on_disconnect


async def test_generate_prints_events_as_json() -> None:
    """One line for each, for programs."""
    async with serving(FakeGateway([accepted(), tokens(0, "ü"), finished()])) as server:
        code, out, _ = await run("--address", server.address, "generate", "Once", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [event["event"] for event in events] == ["accepted", "tokens", "finished"]
    assert (events[1]["text"], events[1]["first_index"], events[2]["reason"]) == ("ü", 0, "stop")
    assert events[2]["usage"]["completion_tokens"] == 2


async def test_an_answer_that_ended_early_says_so() -> None:
    """On standard error."""
    answer = [accepted(), tokens(0, "a"), finished(generation_pb2.FINISH_REASON_DEADLINE)]
    async with serving(FakeGateway(answer)) as server:
        code, out, err = await run("--address", server.address, "generate", "Once", "--timeout", "1")
    assert (code, out) == (0, "a\n")
    assert "its time was over" in err


async def test_errors_are_one_line_and_a_code() -> None:
    """2 for what cannot be asked, 1 for what failed."""
    async with serving(
        FakeGateway([InvalidRequest("must be in [0, 100], not 101", field="sampling.temperature")])
    ) as server:
        refused = await run("--address", server.address, "generate", "Once", "--temperature", "101")
    assert refused == (2, "", "holdfast: sampling.temperature: must be in [0, 100], not 101\n")
    async with serving(FakeGateway([NotFound("no model 'x'; this mesh serves: tiny")])) as server:
        unknown = await run("--address", server.address, "generate", "Once", "--model", "x")
    assert unknown == (1, "", "holdfast: no model 'x'; this mesh serves: tiny\n")
    code, out, err = await run("--address", server.address, "generate", "Once")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert f"no gateway answers at {server.address}" in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["generate"], ["sing"], ["generate", "x", "--max", "1"]],
)
def test_usage_errors_are_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As argparse says them."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: holdfast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "right"),
    [
        ("--max-tokens", "-3", "a whole number from 1 to "),
        ("--max-tokens", "many", "a whole number from 1 to "),
        ("--top-k", "-1", "a whole number from 0 to "),
        ("--seed", str(1 << 64), f"a whole number from 0 to {2**64 - 1}, "),
        ("--temperature", "nan", "a number from 0 to 1000000000, "),
        ("--timeout", "inf", "a number from 0 to 1000000000, "),
        ("--top-p", "half", "a number from 0 to 1000000000, "),
    ],
)
def test_a_value_that_cannot_be_is_named_in_one_line(
    flag: str, value: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is asked, in words of ours."""
    for command in ("chat", "generate"):
        assert main([command, "Once", flag, value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"holdfast: {flag} must be {right}")
        assert line.endswith(f"not {value!r}")


@pytest.mark.parametrize("command", [["status"], ["cancel", "r-1"], ["generate", "Once"], ["chat", "Hi"], ["chat"]])
def test_a_port_that_cannot_be_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """gRPC would ask another port, where somebody else may answer."""
    assert main(["--address", "127.0.0.1:99999", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "holdfast: 127.0.0.1:99999 is no address: a port is at most 65535"


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
async def test_what_is_no_text_is_refused_in_one_line(locale: str) -> None:
    """On the command line and on standard input, whatever the locale makes of it."""
    broken = b"caf\xe9"
    async with serving(FakeGateway([accepted(), finished()])) as server:
        for arguments, stdin in (
            (["generate", broken], b""),
            (["chat", "Hi", "--system", broken], b""),
            (["generate", "-"], broken),
            (["chat"], b"Hi\n" + broken + b"\n"),
        ):
            code, _, err = await run("--address", server.address, *arguments, stdin=stdin, LC_ALL=locale)
            assert (code, len(err.splitlines())) == (2, 1), err
            assert "not UTF-8 text" in err


async def test_an_answer_has_a_limit_unless_another_is_given() -> None:
    """The one that --help states; an answer that comes to its end there says so."""
    gateway = FakeGateway([accepted(), tokens(0, "a"), finished(generation_pb2.FINISH_REASON_LENGTH)])
    async with serving(gateway) as server:
        for command, limit in (("generate", 256), ("chat", 1024)):
            _, usage, _ = await run(command, "--help")
            assert f"by default after {limit}," in " ".join(usage.split())
            code, out, err = await run(command, "Hi", "--address", server.address)
            assert (code, out) == (0, "a\n")
            assert f"it has {limit} tokens, and --max-tokens allows more" in err
            assert gateway.requests[-1].stop.max_tokens == limit
            assert await run(command, "Hi", "--address", server.address, "--max-tokens", "9") == (0, "a\n", "")
            assert gateway.requests[-1].stop.max_tokens == 9


async def test_a_limit_that_nobody_asked_for_gives_way_to_the_context() -> None:
    """Where the context leaves less, it is what it leaves; a limit that was asked for is refused."""

    class Full(FakeGateway):
        async def Generate(self, request: Any, context: Any) -> Any:
            self.answer = [accepted(), tokens(0, "a"), finished()]
            if request.stop.HasField("max_tokens"):
                self.answer = [InvalidRequest("max_tokens may be at most 8", field="stop.max_tokens")]
            async for response in super().Generate(request, context):
                yield response

    async with serving(Full()) as server:
        for command in ("generate", "chat"):
            assert await run(command, "Hi", "--address", server.address) == (0, "a\n", "")
            code, _, err = await run(command, "Hi", "--address", server.address, "--max-tokens", "9")
            assert (code, err) == (2, "holdfast: stop.max_tokens: max_tokens may be at most 8\n")


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """Tests run as a script's job that is not waited for."""
    with on_interrupt(signal.SIG_IGN):
        yield


async def test_resume_prints_the_rest() -> None:
    """From the cursor on; a cursor that is none is refused as an argument is."""
    events = [resumed(7), again(tokens(7, "the rest")), again(finished())]
    gateway = FakeGateway(resumed=[events, events, [InvalidRequest("not a cursor", field="cursor")]])
    async with serving(gateway) as server:
        assert await run("--address", server.address, "resume", "c1") == (0, "the rest\n", "")
        code, out, _ = await run("resume", "c1", "--json", "--address", server.address)
        assert (code, [json.loads(line)["event"] for line in out.splitlines()]) == (
            0,
            ["resumed", "tokens", "finished"],
        )
        assert await run("resume", "no", "--address", server.address) == (2, "", "holdfast: cursor: not a cursor\n")
    assert gateway.cursors == ["c1", "c1", "no"]


@pytest.mark.usefixtures("in_the_background")
async def test_an_interrupt_ends_generate_with_130_and_cancels() -> None:
    """Ctrl-C leaves the answer, which tells the gateway."""
    gateway = FakeGateway([accepted()], endless=True)
    async with serving(gateway) as server, terminal("--address", server.address, "generate", "Once") as at:
        await at.read_until(" 3 ")
        at.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(at.process.wait(), 30) == 130
        await asyncio.wait_for(gateway.left.wait(), 30)
    assert gateway.cancelled == [gateway.requests[0].request_id]


async def test_a_reader_that_goes_away_is_no_crash() -> None:
    """`holdfast generate | head -1` ends without a traceback."""
    async with serving(FakeGateway([accepted()], endless=True)) as server:
        shell = f"{' '.join(COMMAND)} --address {server.address} generate Once | head -c 20"
        process = await asyncio.create_subprocess_shell(
            shell, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (len(out), err) == (20, b"")


async def test_chat_remembers_what_was_said() -> None:
    """Each line of standard input is a turn; the system message stands first."""
    gateway = FakeGateway([accepted(), tokens(0, "Yes."), finished()])
    async with serving(gateway) as server:
        code, out, err = await run(
            "--address", server.address, "chat", "--system", "Be short.", stdin="Hi\n\nReally?\n"
        )
    assert (code, out, err) == (0, "Yes.\nYes.\n", "")
    said = [[(message.role, message.content) for message in request.chat.messages] for request in gateway.requests]
    assert said[0] == [("system", "Be short."), ("user", "Hi")]
    assert said[1] == [*said[0], ("assistant", "Yes."), ("user", "Really?")]


async def test_chat_with_a_message_says_only_this() -> None:
    """One turn. The gateway may be named after the command, too."""
    gateway = FakeGateway([accepted(), tokens(0, "Yes."), finished()])
    async with serving(gateway) as server:
        assert await run("chat", "Hi", "--address", server.address) == (0, "Yes.\n", "")


async def test_an_interrupt_stops_the_answer_and_not_the_chat() -> None:
    """What was heard stays in the conversation; the next turn goes on; Ctrl-C at the prompt is no end either."""
    gateway = FakeGateway([accepted()], endless=True)
    async with serving(gateway) as server, terminal("--address", server.address, "chat") as at:
        await at.read_until("tiny at")
        await at.read_until("> ")
        at.type("Count\n")
        await at.read_until(" 3 ")
        at.process.send_signal(signal.SIGINT)
        await at.read_until("(stopped)")
        await asyncio.wait_for(gateway.left.wait(), 30)
        await at.read_until("> ")
        await at.interrupt_until("(Ctrl-D ends)")
        gateway.endless, gateway.answer = False, [accepted(), tokens(0, "Done."), finished()]
        at.type("And?\n")
        await at.read_until("Done.")
        await at.read_until("first after")
        await at.read_until("> ")
        at.type("\x04")
        assert await asyncio.wait_for(at.process.wait(), 30) == 0
    messages = gateway.requests[1].chat.messages
    assert [message.role for message in messages] == ["user", "assistant", "user"]
    assert messages[1].content.startswith(" 0 1 2 3")


async def test_chat_at_a_terminal_survives_a_refusal() -> None:
    """The refused turn leaves no trace."""
    gateway = FakeGateway([NotFound("no such thing")])
    async with serving(gateway) as server, terminal("--address", server.address, "chat") as at:
        await at.read_until("> ")
        at.type("Hi\n")
        await at.read_until("holdfast: no such thing")
        gateway.answer = [accepted(), tokens(0, "Done."), finished()]
        at.type("Again\n")
        await at.read_until("Done.")
    assert [message.content for message in gateway.requests[1].chat.messages] == ["Again"]


@pytest.mark.parametrize("verb", ["generate", "chat"])
async def test_who_waits_for_an_engine_is_told_so(verb: str) -> None:
    """Where nothing comes and the gateway says that it is not ready; the answer comes when it can."""
    gateway = FakeGateway([accepted(), tokens(0, "Here"), finished()])
    gateway.go_on.clear()
    async with serving(gateway) as server, terminal("--address", server.address, verb, "hi") as person:
        await person.read_until("holdfast: waiting: the gateway is not ready")
        gateway.go_on.set()
        await person.read_until("Here")


async def test_cancel_tells_the_gateway() -> None:
    """Which request."""
    gateway = FakeGateway()
    async with serving(gateway) as server:
        code, out, _ = await run("--address", server.address, "cancel", "r-9")
    assert (code, out) == (0, "r-9: the mesh was told to end it\n")
    assert gateway.cancelled == ["r-9"]


async def test_status_says_who_serves_what() -> None:
    """0 where all serve, 1 where one does not."""
    async with serving(FakeGateway()) as server:
        code, out, _ = await run("--address", server.address, "status")
        assert code == 1
        assert "not serving: it is starting or stopping" in out
        await server.health.needs({"log": True, "tokenizer": True, "engine": False})
        code, out, _ = await run("--address", server.address, "status")
        assert code == 1
        assert "not serving: it misses: engine (its /readyz says why)" in out
        assert "it sees: log, tokenizer\n" in out
        await server.health.needs({"log": True, "tokenizer": True, "engine": True})
        await server.health.ready()
        code, out, _ = await run("--address", server.address, "status", "--tokenizer", server.address)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == ["gateway", "it", "tiny:", "tokenizer"]
        assert "it sees: log, tokenizer, engine\n" in out
        assert "512 tokens of context, chat" in out
    code, out, _ = await run("--address", server.address, "status")
    assert code == 1
    assert "no gateway answers" in out


def test_pull_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    """And what would be known."""
    assert main(["pull", "no-such-model"]) == 2
    assert "smollm2-135m-instruct" in capsys.readouterr().err


def test_the_command_needs_only_the_base_install() -> None:
    """No service's library is imported by it."""
    import subprocess

    program = "import sys, holdfast.cli; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    extras = ["torch", "structlog", "numpy", "pydantic", "aiokafka", "uvloop", "prometheus_client", "opentelemetry"]
    out = subprocess.run([sys.executable, "-c", program, *extras], check=True, capture_output=True, text=True).stdout
    assert out == "[]\n"


def test_a_stopwatch_counts_from_the_first_token() -> None:
    """Tokens of the first event do not count for the speed, nor does the wait for them."""
    times = iter([10.0, 12.0, 14.0])
    watch = Stopwatch(clock=lambda: next(times))
    assert str(watch) == "0 tokens"
    for first_index, num_tokens in ((0, 3), (3, 5)):
        watch.see(Tokens(0, first_index, num_tokens, text="", token_ids=(), logprobs=(), cursor=""))
    watch.see(Finished(0, FinishReason.STOP, Usage(1, 0, 8), stop="", cursor=""))
    assert str(watch) == "8 tokens, first after 2.00 s, then 2.5 tokens/s"
