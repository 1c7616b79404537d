"""The gateways that a client knows: which one it talks to, and which one next."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_status import rpc_status

from holdfast import rpc
from holdfast.errors import Cancelled, ConfigurationError, Unavailable, from_rpc_error
from holdfast.v1 import gateway_pb2, gateway_pb2_grpc

_DIAL_SECONDS = 2.0
"""How long a gateway may take to let itself be connected to, where there are others."""

_FAREWELL_SECONDS = 5.0
"""How long the mesh may take to hear that an answer was left."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How a client tries to go on with a stream that broke. The tries are counted anew with every event that comes."""

    tries: int = 8
    first_seconds: float = 0.1
    """Before the first try, more or less; before each further one twice as long."""
    most_seconds: float = 2.0
    """Before any try."""

    def before(self, index: int) -> float:
        """Seconds to wait before a try, from 0: drawn, so that not all clients of a gateway that died come at once."""
        return float(min(self.most_seconds, self.first_seconds * 2**index) * random.uniform(0.5, 1.0))


PATIENT = Patience()
"""Some ten seconds."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """One of them."""

    address: str
    channel: grpc.aio.Channel
    stub: gateway_pb2_grpc.GatewayServiceAsyncStub


class Gateways:
    """Connections to all of them, of which one is in use."""

    def __init__(self, addresses: Sequence[str]) -> None:
        if not addresses:
            raise ConfigurationError("a client needs the address of a gateway")
        self.addresses = tuple(addresses)
        self._all: list[Gateway] = []
        self._index = 0
        self._farewells: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connected, or to be, while the block runs."""
        async with AsyncExitStack() as stack:
            for address in self.addresses:
                channel = await stack.enter_async_context(rpc.channel(address))
                self._all.append(Gateway(address, channel, gateway_pb2_grpc.GatewayServiceStub(channel)))
            try:
                yield
            finally:
                if self._farewells:
                    await asyncio.wait(self._farewells, timeout=_FAREWELL_SECONDS)

    @property
    def current(self) -> Gateway:
        """The one in use."""
        return self._all[self._index]

    @property
    def address(self) -> str:
        """Of the one in use; all of them before they are open."""
        return self.current.address if self._all else ", ".join(self.addresses)

    def move_on(self, gateway: Gateway) -> None:
        """That one does not serve: use the next one, unless somebody has done so."""
        if gateway is self.current:
            self._index = (self._index + 1) % len(self._all)

    async def reachable(self) -> Gateway:
        """The one in use, or where that cannot be connected to the next one that can. Nothing was asked of any.

        Raises:
            Unavailable: there are several, and none can be connected to.
        """
        if len(self._all) == 1:
            return self.current
        for _ in self._all:
            gateway = self.current
            if await _connects(gateway.channel):
                return gateway
            self.move_on(gateway)
        raise Unavailable(f"no gateway answers at any of {', '.join(self.addresses)}; is one running there?")

    def farewell(self, request_id: str) -> asyncio.Task[None]:
        """Has the mesh end a request in the background, of which nobody wants to know more. The connections stay open for
        it for a while."""
        task = asyncio.get_running_loop().create_task(self._cancel(request_id))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)
        return task

    async def _cancel(self, request_id: str) -> None:
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                gateway = await self.reachable()
                await gateway.stub.Cancel(gateway_pb2.CancelRequest(request_id=request_id), timeout=_FAREWELL_SECONDS)
        except (grpc.RpcError, Unavailable, TimeoutError):
            pass  # it goes on to its own end; nobody is there to be told


async def _connects(channel: grpc.aio.Channel) -> bool:
    """Whether there is a connection, or one can be made."""
    try:
        async with asyncio.timeout(_DIAL_SECONDS):
            state = channel.get_state(try_to_connect=True)
            while state is not grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
                if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    return False
    except TimeoutError:
        return False
    return True


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Turns what a call raises into our errors."""
    try:
        yield
    except grpc.RpcError as error:
        ours = from_rpc_error(error)
        if type(ours) is Unavailable and rpc_status.from_call(error) is None:  # not said by a gateway, but about it
            raise Unavailable(f"no gateway answers at {address}; is one running there? ({ours})") from error
        raise ours from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # The task goes on: it was the call that somebody cancelled.
        raise Cancelled("the answer was closed while its next event was awaited") from None


def broke(error: Exception) -> bool:
    """Whether the error, as `translated` gives it, is of the connection, and not one that a gateway told."""
    return isinstance(error.__cause__, grpc.RpcError) and rpc_status.from_call(error.__cause__) is None
