"""The command: what is judged, on what, and how it is told."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks import quality
from benchmarks.options import at_least, engine_here, file, rules, run, setting, several_settings
from benchmarks.quality.chat import answered, prompts_of
from benchmarks.quality.lookup import NUM_ENTRIES, lookups
from benchmarks.quality.plots import Point, draw, require_matplotlib
from benchmarks.report import Cell, Report
from holdfast import models
from holdfast.errors import ConfigurationError
from services.engine.build import Computer, build
from services.engine.models import load
from services.engine.quality.forced import Forced
from services.engine.quality.passages import Passage, text_of, tokenizer_of, windows_of
from services.engine.quality.scores import Figures, Scores, compare
from services.engine.quality.sensitivity import Sensitivity, sensitivities
from services.engine.quality.sizes import bytes_of, num_weights

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine whose predictions are judged."""

    name: str
    folder: Path
    computer: Computer

    @property
    def forced(self) -> Forced:
        return Forced(self.name, self.computer.model, self.computer.cache)


def subject(name: str, folder: Path, settings: str, *, window: int) -> Subject:
    """The engine of these settings, with a cache for one window. Raises ConfigurationError where they or the window cannot
    be."""
    given: dict[str, object] = {"block_size": 64, "max_sequences": 1, "max_step_tokens": window}
    given |= dict(setting(each) for each in settings.split())
    if "model" in given:
        folder = models.resolve(str(given["model"]))
    checked = engine_here(folder, given)
    assert checked.block_size is not None
    blocks = checked.cache_blocks or max(2, -(-window // checked.block_size))
    computer = build(checked.model_copy(update={"cache_blocks": blocks}), folder)
    if computer.facts.max_model_len < window:
        raise ConfigurationError(
            f"a window has {window:,} tokens, and the model takes {computer.facts.max_model_len:,}: lower --window"
        )
    return Subject(name, folder, computer)


def subjects_of(arguments: argparse.Namespace, folder: Path, tokenizer: Tokenizer) -> list[Subject]:
    """Those that are asked for, the reference first. Raises ConfigurationError as `subject` does, and for one whose tokens mean
    something else."""
    wanted = {arguments.reference: arguments.reference}
    wanted |= {choice: f"{arguments.reference} {choice}" for choice in arguments.choices}
    found = [subject(name, folder, settings, window=arguments.window) for name, settings in wanted.items()]
    for each in found:
        if each.folder != folder and tokenizer_of(each.folder).get_vocab() != tokenizer.get_vocab():
            raise ConfigurationError(f"{each.name}: {each.folder} has another tokenizer than {folder}")
    return found


def judged(subjects: Sequence[Subject], passages: Sequence[Passage], *, chunk: int, what: str) -> list[Scores]:
    """Scores of each, while it is told how far they are."""
    reference, *others = [each.forced for each in subjects]
    return compare(reference, others, passages, chunk=chunk, progress=teller(what, len(passages)))


def teller(what: str, count: int) -> Callable[[int], None]:
    """Prints what is done of so many, every few seconds."""
    begun = told = time.perf_counter()

    def tell(done: int) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told > 10 or done == count:
            told = now
            left = (now - begun) / done * (count - done)
            print(f"{what}: {done:,} of {count:,}; about {left:,.0f} s left", flush=True)

    return tell


def beside(figures: Figures, reference: Figures) -> list[Cell]:
    """A row's cells for `BESIDE`."""
    change = 100 * (figures.perplexity / reference.perplexity - 1)
    return [figures.perplexity, change, figures.mean_kl, figures.p99_kl, 100 * figures.agreement]


BESIDE = ["perplexity", "change, %", "mean KL", "99 % KL", "same top token, %"]


def on_text(
    report: Report, subjects: Sequence[Subject], passages: Sequence[Passage], *, chunk: int, weights: int
) -> list[Point]:
    """Adds the table of the windows of a text."""
    found = [each.figures() for each in judged(subjects, passages, chunk=chunk, what="windows")]
    rows: list[list[Cell]] = []
    points = []
    for each, figures in zip(subjects, found, strict=True):
        num_bytes, cache = bytes_of(each.computer.model), each.computer.cache
        points.append(Point(each.name, 8 * num_bytes / weights, figures.perplexity))
        rows.append(
            [
                each.name,
                *beside(figures, found[0]),
                points[-1].bits,
                num_bytes / MIB,
                cache.block_bytes / cache.block_size,
            ]
        )
    report.table(
        f"Text: {len(passages):,} windows of {len(passages[0].ids):,} tokens, {found[0].num_tokens:,} judged",
        ["settings", *BESIDE, "bits a weight in memory", "weights, MiB", "cache bytes a token"],
        rows,
    )
    return points


def on_chat(
    report: Report, subjects: Sequence[Subject], passages: Sequence[Passage], *, chunk: int, num_longer: int
) -> None:
    """Adds the table of answers."""
    scores = judged(subjects, passages, chunk=chunk, what="answers")
    found = [each.figures() for each in scores]
    lengths = [each.agreed_lengths() for each in scores]
    report.table(
        f"Chat: {len(passages):,} answers of the reference, {statistics.mean(each.num_judged for each in passages):.1f} tokens long at the mean, "
        f"{found[0].num_tokens:,} judged; {num_longer:,} longer prompts left out",
        ["settings", *BESIDE, "agreed, median", "agreed, mean"],
        [
            [each.name, *beside(figures, found[0]), float(statistics.median(agreed)), statistics.mean(agreed)]
            for each, figures, agreed in zip(subjects, found, lengths, strict=True)
        ],
    )


def on_lookups(report: Report, subjects: Sequence[Subject], passages: Sequence[Passage], *, chunk: int) -> None:
    """Adds the table of the task."""
    scores = judged(subjects, passages, chunk=chunk, what="lookups")
    report.table(
        f"Lookups: numbers of {NUM_ENTRIES} names in the context, {len(passages):,} asked for; by chance {100 / NUM_ENTRIES:.1f} %",
        ["settings", "right", "right, %"],
        [
            [each.name, found.num_exact(), 100 * found.num_exact() / len(passages)]
            for each, found in zip(subjects, scores, strict=True)
        ],
    )


def on_layers(
    report: Report, reference: Subject, formats: Sequence[str], passages: Sequence[Passage]
) -> dict[str, dict[str, float]]:
    """Adds the table of layers that are quantized by themselves, and returns the mean KL by format and part."""
    device = reference.computer.cache.data.device
    found: dict[str, list[Sensitivity]] = {}
    for format in formats:
        quantized = load(
            reference.folder, dtype=reference.computer.model.kv_shape.dtype, device=device, quantization=format
        )
        found[format] = sensitivities(
            reference.computer.model,
            quantized,
            passages,
            name=format,
            device=device,
            progress=teller(f"layers, {format}", len(passages)),
        )
    columns = ["part", "MiB"]
    for format in formats:
        columns += [f"{format}: MiB", "mean KL", "99 % KL"]
    rows: list[list[Cell]] = []
    for parts in zip(*found.values(), strict=True):
        row: list[Cell] = [parts[0].part, parts[0].plain_bytes / MIB]
        for each in parts:
            row += [each.quantized_bytes / MIB, each.figures.mean_kl, each.figures.p99_kl]
        rows.append(row)
    judged = sum(each.num_judged for each in passages)
    report.table(f"One part quantized, all others as they are: {judged:,} tokens judged", columns, rows)
    return {format: {each.part: each.figures.mean_kl for each in parts} for format, parts in found.items()}


def measure(arguments: argparse.Namespace) -> Report:
    """Judges the engines that were asked for."""
    if arguments.plots:
        require_matplotlib()
    folder = models.resolve(arguments.model)
    tokenizer, text = tokenizer_of(folder), text_of(arguments.text)
    windows = windows_of(text, tokenizer, length=arguments.window, most_tokens=arguments.tokens)
    asked = lookups(tokenizer, arguments.lookups)
    subjects = subjects_of(arguments, folder, tokenizer)
    conversations: list[Passage] = []
    if arguments.chat:
        longest = arguments.window - arguments.answer
        prompts, num_longer = prompts_of(arguments.chat, folder, most=arguments.prompts, longest=longest)
        settings = dict(setting(each) for each in arguments.reference.split())
        conversations = answered(prompts, folder, {"max_sequences": 16, **settings}, most_tokens=arguments.answer)
    report = Report(
        "quality",
        settings={
            **{name: value for name, value in vars(arguments).items() if name not in ("out", "plots", "choices")},
            "model": folder.name,
            "text": described(arguments.text),
            "chat": arguments.chat and described(arguments.chat),
            "device": subjects[0].computer.facts.device,
            "threads": torch.get_num_threads(),
        },
    )
    points = on_text(report, subjects, windows, chunk=arguments.chunk, weights=num_weights(folder))
    if conversations:
        on_chat(report, subjects, conversations, chunk=arguments.chunk, num_longer=num_longer)
    if asked:
        on_lookups(report, subjects, asked, chunk=arguments.chunk)
    by_layer = {}
    if arguments.sensitivity:
        few = windows[: max(1, arguments.sensitivity_tokens // arguments.window)]
        by_layer = on_layers(report, subjects[0], arguments.sensitivity, few)
    if arguments.plots:
        print(f"drawn: {', '.join(map(str, draw(arguments.plots, points, by_layer)))}")
    return report


def described(path: Path) -> dict[str, str]:
    """A file as reports name it."""
    return {"file": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.quality`."""
    parser = argparse.ArgumentParser(description=quality.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="smollm2-135m-instruct", help="a folder, or a name that `holdfast pull` knows"
    )
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
    parser.add_argument("--text", type=file, required=True, help="a file of text, packed by gzip or not")
    parser.add_argument("--tokens", type=at_least(2), default=65536, help="how many of it count")
    parser.add_argument("--window", type=at_least(2), default=1024, help="tokens of a context")
    parser.add_argument("--chunk", type=at_least(1), default=256, help="tokens of a step")
    parser.add_argument(
        "--chat", type=file, help="a file of conversations, an object a line with messages, turns, question or prompt"
    )
    parser.add_argument("--prompts", type=at_least(1), default=64, help="how many of them")
    parser.add_argument("--answer", type=at_least(1), default=128, help="most tokens of an answer")
    parser.add_argument("--lookups", type=at_least(0), default=0, help="how many numbers are asked for")
    parser.add_argument(
        "--sensitivity",
        metavar="RULES",
        type=rules,
        action="append",
        default=[],
        help="quantize one layer at a time as these rules of quantization say; repeat it",
    )
    parser.add_argument(
        "--sensitivity-tokens", type=at_least(2), default=2048, help="how many of the text, in whole windows"
    )
    parser.add_argument("--plots", type=Path, help="a folder for bits.svg and sensitivity.svg")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args(argv)
    run("quality", lambda: measure(arguments), out=arguments.out)


if __name__ == "__main__":
    main()
