"""Templates that run away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.tokenizer.chat import TemplateError
from services.tokenizer.renderer import rendering

USER = {"role": "user", "content": "Hello"}

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = i * j %}{% endfor %}{% endfor %}"
GROWS = (
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
)
POWER = "{{ 9 ** (9 ** (n + 1)) }}"
TEMPLATE = (
    f"{{% if mode == 'loops' %}}{LOOPS}{{% elif mode == 'grows' %}}{GROWS}{{% elif mode == 'power' %}}{POWER}"
    "{% endif %}{{ messages[0].content }}{{ bos_token }}"
)


async def test_a_conversation_is_rendered_in_another_process() -> None:
    """The renderer gives what the template gives, for conversations of any size, also many at once."""
    async with rendering({"default": TEMPLATE}, {"bos_token": "<s>"}, limit_seconds=60) as renderer:
        assert await renderer.render([USER], {}) == ["Hello<s>"]
        large = {"role": "user", "content": "é\n" * 1_000_000}
        texts = await asyncio.gather(*(renderer.render([message], {}) for message in [large, USER, large, USER]))
        assert texts == [[large["content"] + "<s>"], ["Hello<s>"]] * 2


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("loops", "took more than 2 seconds"), ("power", "took more than 2 seconds"), ("grows", "too much memory")],
)
async def test_a_template_that_runs_away_is_ended(mode: str, reason: str) -> None:
    """One that loops or grows without end is refused, and the next conversation is rendered."""
    limit = 60 if mode == "grows" else 2
    async with rendering({"default": TEMPLATE}, {}, limit_seconds=limit) as renderer:
        with pytest.raises(TemplateError, match=reason):
            await renderer.render([USER], {"mode": mode, "n": 9})
        assert await renderer.render([USER], {}) == ["Hello"]


async def test_a_caller_that_gives_up_disturbs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a cancelled call never reaches another one, and the process that all share is not ended for it."""
    started = []
    start = asyncio.create_subprocess_exec

    async def counted(*command: Any, **options: Any) -> Any:
        started.append(command)
        return await start(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", counted)
    async with rendering({"default": TEMPLATE}, {}, limit_seconds=60) as renderer:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await renderer.render([USER], {})
            assert await renderer.render([{"role": "user", "content": "next"}], {}) == ["next"]
    assert len(started) == 1


async def test_a_template_that_runs_away_is_ended_though_its_caller_gave_up() -> None:
    """The next conversation waits for its turn, and is rendered."""
    async with rendering({"default": TEMPLATE}, {}, limit_seconds=1) as renderer:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await renderer.render([USER], {"mode": "loops"})
        assert await renderer.render([USER], {}) == ["Hello"]


async def test_an_error_of_a_template_leaves_its_process_running() -> None:
    """A conversation that a template refuses costs no restart."""
    async with rendering({"default": "{{ raise_exception('no') }}"}, {}, limit_seconds=60) as renderer:
        for _ in range(3):
            with pytest.raises(TemplateError, match="refuses this conversation: no"):
                await renderer.render([USER], {})


async def test_a_request_full_of_special_tokens_is_refused() -> None:
    """Its pieces would be too many to be looked at while others wait; some thousands are not."""
    async with rendering({"default": TEMPLATE}, {}, limit_seconds=60, unsayable=["<s>"]) as renderer:
        assert len(await renderer.render([USER | {"content": "<s>" * 10_000}], {})) == 10_001
        with pytest.raises(TemplateError, match="spelled out 20000 times; at most 16383"):
            await renderer.render([USER | {"content": "<s>" * 20_000}], {})


async def test_a_wrong_template_stops_the_start() -> None:
    """It is compiled when the renderer starts."""
    with pytest.raises(TemplateError, match="wrong in line 1"):
        async with rendering({"default": "{% for %}"}, {}, limit_seconds=60):
            pytest.fail("started")
