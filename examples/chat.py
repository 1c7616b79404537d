"""A conversation of two turns; the second one leans on the first."""

import asyncio
import os

from holdfast.client import DEFAULT_ADDRESS, Client, Message


async def main() -> None:
    messages: list[Message] = [{"role": "system", "content": "You answer in one short sentence."}]
    async with Client(os.environ.get("HOLDFAST_ADDRESS", DEFAULT_ADDRESS)) as client:
        for question in ("What is the capital of France?", "What is that city famous for?"):
            messages.append({"role": "user", "content": question})
            said = []
            async for text in client.generate(messages=messages, max_tokens=60, temperature=0).text():
                said.append(text)
                print(text, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": "".join(said)})


asyncio.run(main())
