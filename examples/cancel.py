"""A request that would go on, until it is cancelled by its id; from here, or from any other program."""

import asyncio
import os

from holdfast.client import DEFAULT_ADDRESS, Client
from holdfast.events import Finished, Tokens


async def main() -> None:
    # It would run on even if this program ended here: only `cancel`, or its timeout, ends it before its last token.
    async with (
        Client(os.environ.get("HOLDFAST_ADDRESS", DEFAULT_ADDRESS)) as client,
        client.generate("One, two,", ignore_eos=True, cancel_on_exit=False, timeout=60) as answer,
    ):
        async for event in answer:
            if isinstance(event, Tokens):
                print(event.text, end="", flush=True)
                await client.cancel(answer.request_id)
            elif isinstance(event, Finished):
                print(f"\n({event.usage.completion_tokens} tokens; {event.reason.value})")


asyncio.run(main())
