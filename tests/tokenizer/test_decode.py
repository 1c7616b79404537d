"""Ids to text as they come."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError, InvalidRequest
from services.tokenizer.decode import Decoded, Detokenizer
from services.tokenizer.loading import ModelTokenizer
from services.tokenizer.spelling import spelling
from tests.tokenizer.conftest import random_text

NAMES = ["qwen3", "llama-3", "smollm2", "stories260k"]
BYTE_LEVEL = ["qwen3", "llama-3", "smollm2"]

Detokenizers = dict[str, Detokenizer]


@pytest.fixture(scope="session")
def detokenizers(tokenizers: dict[str, ModelTokenizer]) -> Detokenizers:
    """One for each tokenizer."""
    return {name: Detokenizer(tokenizer) for name, tokenizer in tokenizers.items()}


def groups(ids: list[int], rng: random.Random, *, largest: int) -> Iterator[list[int]]:
    """The ids in groups of random sizes."""
    while ids:
        size = rng.randint(1, largest)
        yield ids[:size]
        ids = ids[size:]


def streamed(
    detokenizer: Detokenizer, ids: list[int], rng: random.Random, *, prompt: list[int], largest: int
) -> list[str]:
    """The texts that a caller shows who keeps the contract of DecodeItem: five ids of context, unconsumed ids again."""
    shown, pending, texts = list(prompt), list[int](), list[str]()
    parts = list(groups(ids, rng, largest=largest))
    for number, part in enumerate(parts, 1):
        pending += part
        decoded = detokenizer.decode(pending, context=shown[-5:], last=number == len(parts))
        texts.append(decoded.text)
        shown += pending[: decoded.num_consumed]
        del pending[: decoded.num_consumed]
        assert len(pending) <= 3
    assert not pending
    return texts


def at_once(tokenizer: ModelTokenizer, ids: list[int]) -> str:
    """What the library makes of all ids in one call."""
    text: str = tokenizer.backend.decode(ids)
    return text


@pytest.mark.parametrize("largest", [1, 6])
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_shows_what_decoding_at_once_gives(
    name: str, largest: int, tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """1,000 random texts of many scripts, their ids fed one at a time or in random groups, come out as they do at
    once."""
    rng = random.Random(f"{name} {largest}")
    for _ in range(1000):
        ids = tokenizers[name].backend.encode(random_text(rng), add_special_tokens=False).ids
        texts = streamed(detokenizers[name], ids, rng, prompt=[], largest=largest)
        # SmolLM's vocabulary lacks some bytes, so its ids may end within a character, which a stream leaves out.
        expected = at_once(tokenizers[name], ids)
        assert "".join(texts) in (expected, expected.removesuffix("\ufffd"))


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_a_stream_of_any_ids_shows_what_decoding_at_once_gives(
    name: str, tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """Ids drawn at random, which spell much that is not UTF-8, come out with the same replacement characters as at
    once."""
    rng = random.Random(name)
    of_bytes = [id for token, id in tokenizers[name].backend.get_vocab().items() if len(token) <= 2]
    for _ in range(1000):
        ids = rng.choices(of_bytes, k=rng.randint(1, 20))
        text = "".join(streamed(detokenizers[name], ids, rng, prompt=[], largest=4))
        expected = at_once(tokenizers[name], ids)
        assert text in (expected, expected.removesuffix("\ufffd"))


@pytest.mark.parametrize("name", ["qwen3", "llama-3", "stories260k"])
def test_an_unfinished_character_is_never_shown(
    name: str, tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """No message of a stream of valid text has a replacement character, and each goes on where the one before ended."""
    rng = random.Random(name)
    num_unfinished = 0
    for _ in range(300):
        text = random_text(rng)
        ids = tokenizers[name].backend.encode(text, add_special_tokens=False).ids
        texts = streamed(detokenizers[name], ids, rng, prompt=[], largest=1)
        assert not any("\ufffd" in part for part in texts)
        num_unfinished += texts.count("")
    assert num_unfinished > 100


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_goes_on_where_its_prompt_ends(
    name: str, tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """Prompt and stream together are the text, wherever the ids are cut between two characters."""
    rng = random.Random(name)
    num_cuts = 0
    for _ in range(300):
        ids = tokenizers[name].backend.encode(random_text(rng)).ids
        cut = rng.randint(1, len(ids))
        prompt, whole = at_once(tokenizers[name], ids[:cut]), at_once(tokenizers[name], ids)
        if "\ufffd" in prompt + whole[-1:]:
            continue
        num_cuts += 1
        assert prompt + "".join(streamed(detokenizers[name], ids[cut:], rng, prompt=ids[:cut], largest=3)) == whole
    assert num_cuts > 100


def test_a_character_begun_in_the_prompt_is_shown_once_it_is_finished(
    tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """A prompt that ends within a character leaves the whole character to the stream."""
    ids = tokenizers["stories260k"].backend.encode("a🦙b", add_special_tokens=False).ids
    assert len(ids) == 6  # a with the space before it, four bytes, b
    assert detokenizers["stories260k"].decode(ids[3:], context=ids[:3]) == Decoded("🦙b", 3)


def test_the_ids_of_an_unfinished_character_come_again(
    tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """The text covers the ids before the character; with `last` it covers all, and the unfinished character is
    dropped."""
    ids = tokenizers["stories260k"].backend.encode("ab🦙", add_special_tokens=False).ids
    unfinished, num_before = ids[:-1], len(ids) - 4
    assert detokenizers["stories260k"].decode(unfinished) == Decoded("ab", num_before)
    assert detokenizers["stories260k"].decode(unfinished, last=True) == Decoded("ab", len(unfinished))
    assert detokenizers["stories260k"].decode(ids) == Decoded("ab🦙", len(ids))


def test_text_before_an_unfinished_character_in_one_token_is_shown_at_once(
    tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """A token of a space and the first byte of a character shows the space; the rest of the character completes it."""
    backend, detokenizer = tokenizers["llama-3"].backend, detokenizers["llama-3"]
    space_and_lead = backend.token_to_id("ĠðŁ")  # 20 F0 9F
    camel = backend.token_to_id("Ĳ"), backend.token_to_id("ª")  # 90 AA
    assert detokenizer.decode([space_and_lead]) == Decoded(" ", 1)
    assert detokenizer.decode([camel[0]], context=[space_and_lead]) == Decoded("", 1)
    assert detokenizer.decode([camel[1]], context=[space_and_lead, camel[0]]) == Decoded("🐪", 1)


def test_only_the_first_word_of_a_text_loses_its_space(
    tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """A SentencePiece vocabulary spells the space before a word; at the start of a text, also behind special tokens,
    there is none."""
    ids = tokenizers["stories260k"].backend.encode("the the", add_special_tokens=False).ids
    bos = tokenizers["stories260k"].bos_token_id
    assert bos is not None
    assert detokenizers["stories260k"].decode(ids).text == "the the"
    assert detokenizers["stories260k"].decode(ids, context=[bos]).text == "the the"
    assert detokenizers["stories260k"].decode(ids, context=ids).text == " the the"


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_shown_only_if_asked(
    name: str, tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """A special token has no text unless the item wants it; a token that is added but not special always has."""
    tokenizer, detokenizer = tokenizers[name], detokenizers[name]
    eos = tokenizer.eos_token_ids[-1]
    assert detokenizer.decode([eos]) == Decoded("", 1)
    assert detokenizer.decode([eos], show_special_tokens=True).text == tokenizer.backend.id_to_token(eos)
    if name == "qwen3":
        assert detokenizer.decode([tokenizer.backend.token_to_id("<think>")]).text == "<think>"


def test_ids_that_only_the_model_has_are_silent(
    tokenizers: dict[str, ModelTokenizer], detokenizers: Detokenizers
) -> None:
    """Qwen's embedding has more rows than its tokenizer has tokens; an id of such a row decodes to nothing."""
    tokenizer = tokenizers["qwen3"]
    assert tokenizer.backend.get_vocab_size() < tokenizer.vocab_size
    assert detokenizers["qwen3"].decode([tokenizer.vocab_size - 1]) == Decoded("", 1)


def test_an_id_beyond_the_vocabulary_is_refused_by_name(detokenizers: Detokenizers) -> None:
    """The error names the place of the id in the item."""
    with pytest.raises(InvalidRequest, match="token id 512 is not below the vocabulary's size, 512") as caught:
        detokenizers["stories260k"].decode([3, 512])
    assert caught.value.field == "ids[1]"
    with pytest.raises(InvalidRequest) as caught:
        detokenizers["stories260k"].decode([3], context=[1, 2, 9999])
    assert caught.value.field == "context[2]"


def test_an_unknown_decoder_stops_the_start() -> None:
    """A tokenizer that spells in a way not known here is refused, not decoded wrongly."""
    with pytest.raises(ConfigurationError, match="WordPiece"):
        spelling({"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(ConfigurationError, match="no decoder"):
        spelling({})


REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
BYTES, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}

DECODERS = {
    "Llama 2": {"type": "Sequence", "decoders": [REPLACE, BYTES, FUSE, STRIP]},
    "Gemma": {"type": "Sequence", "decoders": [REPLACE, BYTES, FUSE]},
    "Metaspace": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "Metaspace, first": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    "Metaspace, never": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
    "byte level": BYTE_LEVEL_DECODER,
    "byte level in a sequence": {"type": "Sequence", "decoders": [BYTE_LEVEL_DECODER, FUSE]},
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_all_families_spell_as_the_library_does(name: str) -> None:
    """Any tokens come out of a stream as the tokenizers library decodes them at once, spaces at the start included."""
    from tokenizers import Tokenizer, models

    byte_tokens = [f"<0x{byte:02X}>" for byte in "中".encode()]
    tokens = ["▁", "▁▁", "▁a", "a▁b", "▁▁b", "ab", "Ġa", "ж", "中", "<s>", "<0x0A>", *byte_tokens]
    backend = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[]))
    content = json.loads(backend.to_str()) | {"decoder": DECODERS[name]}
    tokenizer = _tokenizer(Tokenizer.from_str(json.dumps(content)))
    detokenizer = Detokenizer(tokenizer)
    rng = random.Random(name)
    words = [[id] for id in range(len(tokens) - 3)] + [list(range(len(tokens) - 3, len(tokens)))]
    for _ in range(500):
        ids = [id for word in rng.choices(words, k=rng.randint(1, 5)) for id in word]
        assert "".join(streamed(detokenizer, ids, rng, prompt=[], largest=2)) == at_once(tokenizer, ids)


@given(st.binary(max_size=12), st.data())
def test_any_bytes_cut_anywhere_read_the_same(data: bytes, draw: st.DataObject) -> None:
    """However bytes are dealt out to ids and messages, the text is that of all bytes, less an unfinished end."""
    detokenizer = _of_bytes()
    rng = random.Random(draw.draw(st.integers()))
    text = "".join(streamed(detokenizer, list(data), rng, prompt=[], largest=3))
    expected = data.decode(errors="replace")
    assert text in (expected, expected.removesuffix("\ufffd"))


def _of_bytes() -> Detokenizer:
    """A vocabulary of the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE(vocab={f"<0x{byte:02X}>": byte for byte in range(256)}, merges=[]))
    backend.decoder = decoders.ByteFallback()
    return Detokenizer(_tokenizer(backend))


def _tokenizer(backend: Any) -> ModelTokenizer:
    """A tokenizer of a model about which nothing else is known."""
    return ModelTokenizer(
        backend=backend,
        decoder=json.loads(backend.decoder.__getstate__()),
        special_ids=frozenset(),
        vocab_size=backend.get_vocab_size(),
        context_length=16,
        bos_token_id=None,
        eos_token_ids=(),
        digest="",
        special_texts=(),
        special_tokens={},
        sampling={},
        chat_templates={},
    )
