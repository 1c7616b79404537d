"""The gateways that a client knows: which one it talks to, and which one next."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from grpc_status import rpc_status

from holdfast import rpc
from holdfast.errors import (
    Cancelled,
    ConfigurationError,
    HoldfastError,
    NotAccepted,
    Overloaded,
    RetryableError,
    Unavailable,
    from_rpc_error,
)
from holdfast.v1 import gateway_pb2, gateway_pb2_grpc

T = TypeVar("T")

_DIAL_SECONDS = 2.0
"""How long a gateway may take to let itself be connected to, where there are others."""

_DIAL_ALONE_SECONDS = 20.0
"""And where there are none."""

_FAREWELL_SECONDS = 5.0
"""How long the mesh may take to hear that an answer was left."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How a client goes on where its gateway went: with a stream that broke, or with a call that was not taken. The tries
    for a stream are counted anew with every event that comes."""

    tries: int = 30
    first_seconds: float = 0.1
    """Before the first try, more or less; before each further one twice as long."""
    most_seconds: float = 2.0
    """Before any try."""

    def before(self, index: int) -> float:
        """Seconds to wait before a try, from 0: drawn, so that not all clients of a gateway that died come at once."""
        return float(min(self.most_seconds, self.first_seconds * 2**index) * random.uniform(0.5, 1.0))


PATIENT = Patience()
"""Some forty seconds: a gateway that has no other beside it may drain (`drain_seconds`) and start again meanwhile."""


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
        self.met = False
        """Whether one of them was there once."""
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
            NotAccepted: none can be connected to.
        """
        seconds = _DIAL_SECONDS if len(self._all) > 1 else _DIAL_ALONE_SECONDS
        for _ in self._all:
            gateway = self.current
            if await _connects(gateway.channel, seconds):
                self.met = True
                return gateway
            self.move_on(gateway)
        where = f"any of {', '.join(self.addresses)}" if len(self._all) > 1 else self.address
        raise NotAccepted(f"no gateway answers at {where}; is one running there?")

    async def ask(self, call: Callable[[Gateway], Awaitable[T]], patience: Patience) -> T:
        """What a gateway answers to a call that may be made again though an earlier one was heard.

        Raises:
            HoldfastError: what it answered last, instead.
        """
        tries = Tries(self, patience)
        while True:
            gateway = None
            try:
                gateway = await self.reachable()
                with translated(gateway.address):
                    return await call(gateway)
            except HoldfastError as error:
                if not is_lost(error):
                    raise
                await tries.after(error, gateway)

    async def cancel(self, wish: gateway_pb2.CancelRequest, patience: Patience, *, timeout: float) -> None:
        """Returns when the mesh has the wish that a request end. `timeout`: seconds that a gateway may take to hear it."""

        async def call(gateway: Gateway) -> None:
            await gateway.stub.Cancel(wish, timeout=timeout)

        await self.ask(call, patience)

    def farewell(self, wish: gateway_pb2.CancelRequest) -> asyncio.Task[None]:
        """Has the mesh end a request in the background, of which nobody wants to know more. The connections stay open for
        it for a while."""
        task = asyncio.get_running_loop().create_task(self._say_farewell(wish))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)
        return task

    def renew(self, request: gateway_pb2.GenerateRequest) -> None:
        """Nobody knows whether the mesh has this request: gives it another id, and has the mesh end the one before."""
        self.farewell(gateway_pb2.CancelRequest(request_id=request.request_id))
        request.request_id = uuid.uuid4().hex

    async def _say_farewell(self, wish: gateway_pb2.CancelRequest) -> None:
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self.cancel(wish, PATIENT, timeout=_FAREWELL_SECONDS)
        except (HoldfastError, TimeoutError):
            pass  # it goes on to its own end; nobody is there to be told


class Tries:
    """The tries for one call, or for one stream to go on, of which one was made already."""

    def __init__(self, gateways: Gateways, patience: Patience) -> None:
        self._gateways = gateways
        self._patience = patience
        self.num_failed = 0

    def begin_anew(self) -> None:
        """There was success."""
        self.num_failed = 0

    async def after(self, error: HoldfastError, gateway: Gateway | None, *, going_on: bool = False) -> None:
        """Counts a failure as `count` does, and returns when it is time for another try."""
        self.count(error, gateway, going_on=going_on)
        await self.pause(error)

    def count(self, error: HoldfastError, gateway: Gateway | None, *, going_on: bool = False) -> None:
        """Counts a failure. The next try is for the gateway after the one that failed (None: there was none). A gateway
        that was there and went is waited for, and where the mesh has the request (`going_on`) whatever is missing;
        otherwise each gateway is asked once.

        Raises:
            HoldfastError: the error, where there were tries enough.
        """
        self.num_failed += 1
        patient = going_on or (self._gateways.met and is_passing(error))
        if self.num_failed > (self._patience.tries if patient else len(self._gateways.addresses) - 1):
            raise error
        if gateway is not None:
            self._gateways.move_on(gateway)

    async def pause(self, error: HoldfastError) -> None:
        """Returns when it is time for another try. A gateway that is full says when it may not be; of one that went the next
        one need not wait for what it said."""
        if not has_moved(error):
            told = error.retry_after if isinstance(error, Overloaded) else 0.0
            await asyncio.sleep(max(told, self._patience.before(self.num_failed - 1)))


async def _connects(channel: grpc.aio.Channel, seconds: float) -> bool:
    """Whether there is a connection, or one can be made. A channel that failed tries again by itself, every two seconds at
    least, and until it has succeeded counts as failed."""
    try:
        async with asyncio.timeout(seconds):
            while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    return False
                await channel.wait_for_state_change(state)
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


def is_lost(error: HoldfastError) -> bool:
    """Whether a call failed because of where it was made: another gateway may answer it."""
    return isinstance(error, Unavailable) or (isinstance(error, Cancelled) and broke(error))


def has_moved(error: HoldfastError) -> bool:
    """Whether a gateway says that the call goes on elsewhere, at once."""
    return isinstance(error, RetryableError) and error.retry_after == 0


def is_passing(error: HoldfastError) -> bool:
    """Whether the gateway went, and comes back or has successors, rather than misses what it needs."""
    return isinstance(error, NotAccepted) or broke(error) or has_moved(error)
