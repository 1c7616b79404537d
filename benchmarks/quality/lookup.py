"""A task with one right answer: to find a number in a list that stands in the context.

As in the retrieval of keys and values of Liu et al. 2023 ("Lost in the Middle", section 3), with a list of names and one answered
question before the one that is asked. Who says any number of the list is right in one case of `NUM_ENTRIES`.
"""

from __future__ import annotations

import random

from tokenizers import Tokenizer

from services.engine.quality.passages import Passage

NUM_ENTRIES = 8
_DIGITS = 4
_NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack",
    "Karen", "Leo", "Maria", "Nora", "Oscar", "Paul", "Rita", "Sam", "Tina", "Victor",
)  # fmt: skip


def lookups(tokenizer: Tokenizer, count: int, *, seed: int = 0) -> list[Passage]:
    """So many of them, the same for the same seed; the answer, up to the end of its line, is what is judged."""
    draw = random.Random(seed)
    return [_passage(tokenizer, *_lookup(draw)) for _ in range(count)]


def _lookup(draw: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    numbers = {
        name: "".join(draw.choice("0123456789") for _ in range(_DIGITS)) for name in draw.sample(_NAMES, NUM_ENTRIES)
    }
    shown, asked = draw.sample(list(numbers), 2)
    entries = "".join(f"{name}: {number}\n" for name, number in numbers.items())
    question = f"Telephone list\n{entries}\nThe number of {shown} is {numbers[shown]}.\nThe number of {asked} is"
    return question, f" {numbers[asked]}.\n"


def _passage(tokenizer: Tokenizer, question: str, answer: str) -> Passage:
    """The answer begins with the first token that the question alone does not have."""
    before: list[int] = tokenizer.encode(question, add_special_tokens=False).ids
    whole: list[int] = tokenizer.encode(question + answer, add_special_tokens=False).ids
    same = next((at for at, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
    return Passage(whole, first=same)
