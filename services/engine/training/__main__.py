"""`python -m services.engine.training OUT --text FOLDER (--from MODEL | --config MODEL) ...`"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import typing
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import structlog
import torch
import transformers
from torch import nn

from holdfast import models
from holdfast.errors import ConfigurationError, HoldfastError
from services.engine.models.spec import read_config
from services.engine.quality.passages import tokenizer_of
from services.engine.quant.qat import prepare, release
from services.engine.quant.rules import Rules
from services.engine.quantize.shards import copy_others
from services.engine.training.plan import Plan
from services.engine.training.progress import Point, Progress
from services.engine.training.ranks import Ranks, ranks
from services.engine.training.text import split, tokens
from services.engine.training.trainer import Trainer

log = structlog.get_logger(__name__)

DOCUMENTS = (".txt", ".md", ".txt.gz", ".raw.gz")
"""How the names of files of text end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the command says; returns the exit status."""
    options = _options(arguments)
    logging.captureWarnings(True)
    try:
        plan = Plan(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Plan)})
        with ranks(options.device) as those:
            _train(options, plan, those)
    except (HoldfastError, ValueError) as error:
        log.error("training ended", error=str(error))
        return 1
    return 0


def _train(options: argparse.Namespace, plan: Plan, those: Ranks) -> None:
    progress = Progress(options.out, _task(options, plan))
    with progress.begin() if those.is_first else nullcontext():
        those.wait()
        _go_on(options, plan, those, progress)


def _go_on(options: argparse.Namespace, plan: Plan, those: Ranks, progress: Progress) -> None:
    torch.manual_seed(plan.seed)
    is_trained = options.start is not None
    source = models.resolve(options.start or options.config, weights=is_trained, progress=log.info)
    model = _model(source, trained=is_trained).to(those.device)
    teacher = _teacher(options, plan, those)
    formats = (
        prepare(model, Rules(options.quantization), dtype=getattr(torch, plan.dtype)) if options.quantization else {}
    )
    tokenizer = tokenizer_of(source)
    train_on, apart = split(_documents(options.text), held_out=plan.held_out, seed=plan.seed)
    between = model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 0  # type: ignore[union-attr]
    text, held_out = (tokens(paths, tokenizer, between=between, length=plan.length) for paths in (train_on, apart))
    if those.is_first:
        log.info(
            "training",
            parameters=sum(each.numel() for each in model.parameters()),
            rounded=len(formats),
            tokens=len(text.ids),
            held_out=len(held_out.ids),
            ranks=those.count,
        )
    Trainer(
        model, teacher=teacher, text=text, held_out=held_out, plan=plan, ranks=those, progress=progress, tell=_tell
    ).run()
    if those.is_first:
        release(model)
        if formats:
            model.to(
                getattr(torch, plan.dtype)
            )  # as they were before they were rounded, and as an engine serves them by default
        result = progress.result()
        model.save_pretrained(result)  # type: ignore[operator]
        copy_others(source, result)
        progress.publish()
        log.info("trained", out=str(options.out))


def _model(folder: Path, *, trained: bool) -> nn.Module:
    """In float32: what its config says, with its weights or with new ones."""
    read_config(folder)  # which refuses what transformers would pass over
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if trained:
            return typing.cast(
                nn.Module, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            )
        drawn = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        return typing.cast(nn.Module, drawn)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{folder} is no model that transformers knows: {error}") from error


def _teacher(options: argparse.Namespace, plan: Plan, those: Ranks) -> nn.Module | None:
    name = options.teacher or (options.start if options.quantization else None)
    if name is None or plan.kl == 0:
        return None
    return _model(models.resolve(name, progress=log.info), trained=True).to(those.device, getattr(torch, plan.dtype))


def _documents(paths: Sequence[Path]) -> list[Path]:
    """Files of text, and those in folders."""
    found = []
    for path in paths:
        inside = sorted(each for each in path.rglob("*") if each.name.endswith(DOCUMENTS)) if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise ConfigurationError(f"{path} holds no text; files of it end in {', '.join(DOCUMENTS)}")
        found += inside
    return found


def _task(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What decides the result. Names without their folders: a training may go on elsewhere."""
    named = {name: getattr(options, name) for name in ("start", "config", "teacher")}
    return {
        **{name: models.served_name(given) for name, given in named.items() if given is not None},
        "quantization": options.quantization,
        "text": [path.name for path in options.text],
        **dataclasses.asdict(plan),
    }


def _tell(point: Point) -> None:
    log.info("trained so far", **{name: round(value, 6) for name, value in dataclasses.asdict(point).items()})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.engine.training", description=__doc__)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder of the trained model; a training that was cut off goes on"
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--from", dest="start", metavar="MODEL", help="to begin from: a folder, or a name that `holdfast pull` knows"
    )
    start.add_argument("--config", metavar="MODEL", help="the same, but weights are drawn")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of text, or folders of them")
    parser.add_argument(
        "--quantization", default="", metavar="RULES", help="train with weights rounded so, as the engine takes it"
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="whose distribution is learnt (default with --quantization: --from)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    for field in dataclasses.fields(Plan):
        _add(parser, field)
    return parser.parse_args(arguments)


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    kind = typing.get_type_hints(Plan)[field.name]
    choices = typing.get_args(kind) or None
    required = field.default is dataclasses.MISSING
    parser.add_argument(
        f"--{field.name.replace('_', '-')}",
        type=str if choices else kind,
        choices=choices,
        required=required,
        default=None if required else field.default,
        help=None if required else f"default: {field.default}",
    )


if __name__ == "__main__":
    sys.exit(main())
