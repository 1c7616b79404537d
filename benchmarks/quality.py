"""What a choice of formats costs in quality: perplexity, and how far the predictions are from those of an engine without it.

    python -m benchmarks.quality --text wikitext2_test.raw.gz --with kv_cache_dtype=fp8_e4m3 --with kv_cache_dtype=int8

Each `--with` is an engine's settings, separated by spaces, on top of those of `--reference`. All of them compute the same
tokens, side by side: windows of a text, each from an empty context, in chunks over the paged cache, so that a chunk reads
what the chunks before it left there. Every token of a window but its first counts.

KL is that of the engine's distribution over the vocabulary from the reference's, in nats, at each token.
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.options import at_least, engine_here, file, run, setting, several_settings
from benchmarks.report import Report
from holdfast import models
from holdfast.errors import ConfigurationError
from services.engine.build import Computer, build
from services.engine.state import Batch, Selection


@dataclass(slots=True)
class Subject:
    """An engine whose predictions are judged, and what was found."""

    name: str
    computer: Computer
    nats: list[Tensor] = field(default_factory=list)
    """Of the tokens that came, by its prediction."""
    divergences: list[Tensor] = field(default_factory=list)
    num_agreed: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(torch.cat(self.nats).double().mean().item())

    def judge(self, logits_NV: Tensor, reference_NV: Tensor, next_N: Tensor) -> None:
        """Adds one chunk: both predictions as log-probabilities, and what came."""
        logits_NV = logits_NV.log_softmax(-1)
        self.nats.append(F.nll_loss(logits_NV, next_N, reduction="none").cpu())
        self.divergences.append(F.kl_div(logits_NV, reference_NV, reduction="none", log_target=True).sum(-1).cpu())
        self.num_agreed += int((logits_NV.argmax(-1) == reference_NV.argmax(-1)).sum())

    def row(self, reference: Subject) -> list[str | float]:
        divergences = torch.cat(self.divergences).double()
        cache = self.computer.cache
        return [
            self.name,
            self.perplexity,
            f"{self.perplexity / reference.perplexity - 1:+.3%}",
            f"{divergences.mean().item():.2e}",
            f"{divergences.quantile(0.99).item():.2e}",
            f"{self.num_agreed / len(divergences):.2%}",
            cache.block_bytes / cache.block_size,
        ]


def subject(name: str, folder: Path, settings: str, *, window: int) -> Subject:
    """The engine of these settings, with a cache for one window. Raises ConfigurationError where they or the window cannot
    be."""
    given: dict[str, object] = {"block_size": 64, "max_sequences": 1, "max_step_tokens": window}
    given |= dict(setting(each) for each in settings.split())
    checked = engine_here(folder, given)
    assert checked.block_size is not None
    blocks = checked.cache_blocks or max(2, -(-window // checked.block_size))
    computer = build(checked.model_copy(update={"cache_blocks": blocks}), folder)
    if computer.facts.max_model_len < window:
        raise ConfigurationError(
            f"a window has {window:,} tokens, and the model takes {computer.facts.max_model_len:,}: lower --window"
        )
    return Subject(name, computer)


def chunk_of(ids: Sequence[int], start: int, computer: Computer) -> Batch:
    """The batch that computes these tokens of one sequence, which has the cache's blocks in their order, and all their
    logits."""
    cache, device, end = computer.cache, computer.cache.data.device, start + len(ids)
    positions_N = torch.arange(start, end, device=device)
    nobody = torch.zeros(len(ids), dtype=torch.int64, device=device)
    return Batch(
        token_ids_N=torch.tensor(ids, device=device),
        positions_N=positions_N,
        write_slots_N=positions_N,
        block_tables=torch.arange(cache.num_blocks, dtype=torch.int32, device=device)[None],
        table_rows_S=torch.zeros(1, dtype=torch.int64, device=device),
        query_starts=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
        kv_lengths_S=torch.tensor([end], dtype=torch.int32, device=device),
        sample_rows_R=None,
        num_decodes=int(len(ids) == 1),
        query_lens=[len(ids)],
        kv_lens=[end],
        selection=Selection([], [], nobody, nobody),
    )


@torch.inference_mode()
def judge(subjects: Sequence[Subject], ids: Sequence[int], *, window: int, chunk: int) -> None:
    """Runs every subject over the windows of the text. The first one is the reference."""
    begun = time.perf_counter()
    for first in range(0, len(ids) - window + 1, window):
        tokens = ids[first : first + window]
        for start in range(0, window, chunk):
            part = tokens[start : start + chunk]
            next_N = torch.tensor(tokens[start + 1 : start + chunk + 1])
            reference_NV: Tensor | None = None
            for each in subjects:
                batch = chunk_of(part, start, each.computer)
                logits_NV = each.computer.model.forward(batch, each.computer.cache)[: len(next_N)]
                if reference_NV is None:
                    reference_NV = logits_NV.log_softmax(-1)
                each.judge(logits_NV, reference_NV, next_N.to(logits_NV.device))
        done = first + window
        seconds = (time.perf_counter() - begun) / done * (len(ids) // window * window - done)
        print(f"{done:,} tokens, perplexity {subjects[0].perplexity:.3f}; about {seconds:,.0f} s left", flush=True)


def read(path: Path, tokenizer: Tokenizer, num_tokens: int) -> list[int]:
    """The first tokens of a text, which may be packed, without special tokens."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    ids = tokenizer.encode(content.decode(), add_special_tokens=False).ids
    return list(ids[:num_tokens])


def measure(arguments: argparse.Namespace) -> Report:
    """Judges the engines that were asked for."""
    folder = models.resolve(arguments.model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = read(arguments.text, tokenizer, arguments.tokens)
    if len(ids) < arguments.window:
        raise ConfigurationError(
            f"{arguments.text} has {len(ids):,} tokens here, fewer than a window of {arguments.window:,}: lower --window, or raise --tokens"
        )
    wanted = {arguments.reference: arguments.reference}
    wanted |= {choice: f"{arguments.reference} {choice}" for choice in arguments.choices}
    subjects = [subject(name, folder, settings, window=arguments.window) for name, settings in wanted.items()]
    judge(subjects, ids, window=arguments.window, chunk=arguments.chunk)
    report = Report(
        "quality",
        settings={
            **{name: value for name, value in vars(arguments).items() if name not in ("out", "choices")},
            "model": folder.name,
            "text": arguments.text.name,
            "text_sha256": sha256(arguments.text.read_bytes()).hexdigest(),
            "threads": torch.get_num_threads(),
        },
    )
    columns = ["settings", "perplexity", "change", "mean KL", "99 % KL", "same top token", "bytes a token"]
    title = (
        f"{folder.name} on {arguments.text.name}, {len(ids) // arguments.window} windows of {arguments.window} tokens"
    )
    report.table(title, columns, [each.row(subjects[0]) for each in subjects])
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.quality`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="smollm2-135m-instruct", help="a folder, or a name that `holdfast pull` knows"
    )
    parser.add_argument("--text", type=file, required=True, help="a file of text, packed by gzip or not")
    parser.add_argument("--tokens", type=at_least(2), default=32768, help="how many of it count")
    parser.add_argument("--window", type=at_least(2), default=1024, help="tokens of a context")
    parser.add_argument("--chunk", type=at_least(1), default=256, help="tokens of a step")
    parser.add_argument(
        "--reference", type=several_settings, default="dtype=float32", help="settings, separated by spaces"
    )
    parser.add_argument(
        "--with",
        dest="choices",
        type=several_settings,
        action="append",
        default=[],
        help="settings on top of these; repeat it",
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args(argv)
    run("quality", lambda: measure(arguments), out=arguments.out)


if __name__ == "__main__":
    main()
