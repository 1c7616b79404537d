"""One real Apache Kafka broker for development and tests, from nothing but Java and Maven.

    python deploy/kafka/broker.py fetch     # once: the jars, to the cache
    python deploy/kafka/broker.py run       # a broker on a free port until Ctrl-C; prints host:port when it is ready
    python deploy/kafka/broker.py start     # the same in the background, on port 9092; its records survive `stop`
    python deploy/kafka/broker.py stop
    python deploy/kafka/broker.py run --quorum 127.0.0.1:9093,127.0.0.1:9193,127.0.0.1:9293 --node 0 --port 9092 --folder a
                                            # one of three, each started so with its own node, port and folder

and in Python:

    with running() as bootstrap:
        ...
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
START_SECONDS = 60
STOP_SECONDS = 20
ATTEMPTS = 3


class BrokerError(Exception):
    """There can be no broker: Java, Maven or the jars are missing, or it does not start."""


class PortTaken(BrokerError):
    """Somebody else took the port between its choice and its use."""


def version() -> str:
    """The version of Kafka that pom.xml names."""
    found = re.search(r"<kafka\.version>(.+)</kafka\.version>", (HERE / "pom.xml").read_text())
    assert found is not None
    return found[1]


def cache() -> Path:
    """Where this version of Kafka is kept: below `HOLDFAST_CACHE`, by default the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HOLDFAST_CACHE") or user / "holdfast") / f"kafka-{version()}"


def fetch() -> Path:
    """The folder of the broker's jars, fetched by Maven if they are not there.

    Raises:
        BrokerError: there is no Maven, or it cannot fetch them.
    """
    lib = cache() / "lib"
    if lib.is_dir():
        return lib
    maven = _program("mvn")
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as name:
        work = Path(name)
        shutil.copy(HERE / "pom.xml", work)
        done = subprocess.run([maven, "-B", "-q", "package"], cwd=work, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise BrokerError(f"Maven cannot fetch Kafka {version()}:\n{done.stdout}{done.stderr}".rstrip())
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster
            (work / "lib").rename(lib)
    return lib


@dataclass(frozen=True)
class Node:
    """One of the brokers of a cluster, each of which is a controller too."""

    number: int
    """From 0."""
    controllers: tuple[str, ...]
    """`host:port` of each broker's controller, the same in the same order for all."""

    @property
    def controller_port(self) -> int:
        return int(self.controllers[self.number].rpartition(":")[2])

    @property
    def cluster(self) -> uuid.UUID:
        """The same for all."""
        return uuid.uuid5(uuid.NAMESPACE_URL, ",".join(self.controllers))


@contextlib.contextmanager
def running(folder: Path | None = None, *, port: int = 0, node: Node | None = None) -> Iterator[str]:
    """A broker and its `host:port`, stopped when the block is left. It keeps its records in `folder`, by default a
    temporary one; a broker started there again has them. Port 0 is any free one. Without a `node` it is a cluster of its
    own; with one the block begins when enough of the others are there.

    Raises:
        BrokerError: it cannot be started; the text has the end of its log.
    """
    java, lib = _program("java"), fetch()
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-kafka-")))
        folder.mkdir(parents=True, exist_ok=True)
        yield stack.enter_context(_on_some_port([java, "-cp", f"{lib}/*"], folder, port, node))


@contextlib.contextmanager
def _on_some_port(java: list[str], folder: Path, port: int, given: Node | None) -> Iterator[str]:
    for attempt in range(1, ATTEMPTS + 1):
        main, controller = _free_ports(port)
        node = given or Node(0, (f"127.0.0.1:{controller}",))
        properties = folder / "server.properties"
        properties.write_text(_properties(folder, main, node))
        if not (folder / "data" / "meta.properties").exists():
            _format(java, properties, node.cluster if given else uuid.uuid4())
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_process(java, properties, folder / "broker.log"))
            except PortTaken:
                if port or attempt == ATTEMPTS:
                    raise
                continue
            yield f"127.0.0.1:{main}"
            return


def _properties(folder: Path, port: int, node: Node) -> str:
    voters = ",".join(f"{number}@{address}" for number, address in enumerate(node.controllers, start=1))
    return (
        (HERE / "server.properties")
        .read_text()
        .format(
            node=node.number + 1,
            voters=voters,
            replicas=min(3, len(node.controllers)),
            in_sync=max(1, min(3, len(node.controllers)) - 1),
            port=port,
            controller_port=node.controller_port,
            data=(folder / "data").as_posix(),
        )
    )


def _format(java: list[str], properties: Path, cluster_id: uuid.UUID) -> None:
    """Makes the data folder a Kafka storage."""
    cluster = base64.urlsafe_b64encode(cluster_id.bytes).decode().rstrip("=")
    done = subprocess.run(
        [java[0], "-Xmx128m", _logging(), *java[1:], "kafka.tools.StorageTool", "format"]
        + [f"--cluster-id={cluster}", "--config", str(properties)],  # the id may begin with a dash
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise BrokerError(f"Kafka's storage cannot be formatted:\n{done.stdout}{done.stderr}".rstrip())


@contextlib.contextmanager
def _process(java: list[str], properties: Path, log: Path) -> Iterator[None]:
    """The broker's process, from the moment it is ready."""
    process = subprocess.Popen(
        [java[0], "-Xms256m", "-Xmx512m", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", _logging(), *java[1:]]
        + ["kafka.Kafka", str(properties)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    heard = threading.Event()
    listener = threading.Thread(target=_listen, args=(process.stdout, log, heard))
    listener.start()
    try:
        in_time = heard.wait(START_SECONDS)
        if not in_time or process.poll() is not None or not _is_ready(log):
            text = log.read_text(errors="replace")
            kind = PortTaken if "Address already in use" in text else BrokerError
            raise kind(f"Kafka does not start; its log, {log}, ends with\n{text[-2000:]}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        listener.join()
        process.stdout.close()


def _listen(output: IO[bytes], log: Path, heard: threading.Event) -> None:
    """Copies what the broker says to its log; `heard` is set when it says that it started, or nothing more."""
    with log.open("wb", buffering=0) as file:
        for line in output:
            file.write(line)
            if STARTED in line:
                heard.set()
    heard.set()


STARTED = b"Kafka Server started"


def _is_ready(log: Path) -> bool:
    return STARTED in log.read_bytes()


def _logging() -> str:
    return f"-Dlog4j2.configurationFile={(HERE / 'log4j2.properties').as_uri()}"


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise BrokerError(f"a Kafka broker needs {name}, which is not on the PATH")
    return found


def _free_ports(port: int) -> tuple[int, int]:
    """The port asked for, or any free one, and another free one for the controller."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return port or first.getsockname()[1], second.getsockname()[1]


def _run(folder: Path | None, port: int, node: Node | None) -> None:
    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(KeyboardInterrupt), running(folder, port=port, node=node) as bootstrap:
        print(bootstrap, flush=True)
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # our one child; it is left for `running` to wait on
        raise BrokerError(f"the broker at {bootstrap} ended by itself")


def _start(folder: Path, port: int) -> None:
    fetch()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.log").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, "run", "--folder", str(folder), "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert process.stdout is not None
    bootstrap = process.stdout.readline().decode().strip()
    if not bootstrap:
        raise BrokerError((folder / "run.log").read_text().strip())
    (folder / "pid").write_text(str(process.pid))
    print(bootstrap)


def _stop(folder: Path) -> None:
    file = folder / "pid"
    if not file.exists():
        raise BrokerError(f"no broker was started in {folder}")
    pid = int(file.read_text())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        limit = time.monotonic() + STOP_SECONDS + 5
        while time.monotonic() < limit:  # not our child: there is nothing to wait on
            os.kill(pid, 0)
            time.sleep(0.1)
        raise BrokerError(f"the broker, process {pid}, does not stop")
    file.unlink()


def _addresses(text: str) -> tuple[str, ...]:
    addresses = tuple(text.split(","))
    if not all(re.fullmatch(r"[^:]+:\d+", each) for each in addresses):
        raise argparse.ArgumentTypeError(f"host:port,host:port is wanted, not {text}")
    return addresses


def main() -> None:
    parser = argparse.ArgumentParser(description=f"One Apache Kafka {version()} broker for development and tests.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("fetch", help="fetch the jars to the cache and print their folder")
    run = verbs.add_parser("run", help="run a broker until a signal; print its address when it is ready")
    run.add_argument("--folder", type=Path, help="where to keep its records; by default a temporary folder")
    run.add_argument("--port", type=int, default=0, help="by default any free one")
    run.add_argument("--quorum", type=_addresses, help="as one of several: the controllers of all, host:port,host:port")
    run.add_argument("--node", type=int, help="which of them it is, from 0")
    for verb, text in (("start", "run one in the background and print its address"), ("stop", "stop that one")):
        background = verbs.add_parser(verb, help=text)
        background.add_argument("--folder", type=Path, default=cache() / "broker", help="default: %(default)s")
        if verb == "start":
            background.add_argument("--port", type=int, default=9092, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.verb == "run" and (arguments.quorum is None) != (arguments.node is None):
        parser.error("--quorum and --node go together")
    if arguments.verb == "run" and arguments.quorum and not 0 <= arguments.node < len(arguments.quorum):
        parser.error(f"--node is 0 to {len(arguments.quorum) - 1}, not {arguments.node}")
    try:
        match arguments.verb:
            case "fetch":
                print(fetch())
            case "run":
                node = Node(arguments.node, arguments.quorum) if arguments.quorum else None
                _run(arguments.folder, arguments.port, node)
            case "start":
                _start(arguments.folder, arguments.port)
            case "stop":
                _stop(arguments.folder)
    except BrokerError as error:
        sys.exit(f"broker.py: {error}")


if __name__ == "__main__":
    main()
