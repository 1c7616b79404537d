"""A continuation as it grows: python examples/stream.py "Once upon a time" """

import asyncio
import os
import sys

from holdfast.client import DEFAULT_ADDRESS, Client
from holdfast.events import Finished, Tokens


async def main(prompt: str) -> None:
    # Leaving the answer's block, in whatever way, cancels what is still running.
    async with (
        Client(os.environ.get("HOLDFAST_ADDRESS", DEFAULT_ADDRESS)) as client,
        client.generate(prompt, max_tokens=50, temperature=0.7, seed=1) as answer,
    ):
        async for event in answer:
            if isinstance(event, Tokens):
                print(event.text, end="", flush=True)
            elif isinstance(event, Finished):
                print(f"\n({event.usage.completion_tokens} tokens; {event.reason.value})")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"))
