"""Text, tokenizer and config of the small Llama: `python recipes/small_llama/prepare.py BOOKS.tar.xz FOLDER`.

Leaves `FOLDER/text`, one file for each book, and `FOLDER/model` with `config.json` and `tokenizer.json`: byte-level BPE (Sennrich et
al. 2016; on bytes: Radford et al. 2019, "GPT-2") of 8,192 words, learnt from these books.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
VOCABULARY = 8192

CONFIG = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    rope_theta=10_000.0,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=0,
    dtype="bfloat16",
)
"""28 million parameters: 4.2 of them in the embedding, 3.0 in each layer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    text, model = options.folder / "text", options.folder / "model"
    with tarfile.open(options.books) as books:
        books.extractall(text, filter="data")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(path) for path in sorted(text.rglob("*.md"))], trainer)
    shutil.rmtree(model, ignore_errors=True)
    CONFIG.save_pretrained(model)
    tokenizer.save(str(model / "tokenizer.json"))
    print(f"{len(list(text.rglob('*.md')))} books, {tokenizer.get_vocab_size()} words: {options.folder}")


if __name__ == "__main__":
    main()
