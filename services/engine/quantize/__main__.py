"""The command: `python -m services.engine.quantize MODEL OUT --scheme FORMAT`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast import models
from holdfast.errors import ConfigurationError
from services.engine import quantize as package
from services.engine.calibrate.choice import Options
from services.engine.quality.passages import Passage
from services.engine.quality.sizes import num_weights
from services.engine.quantize.checks import check_names, check_values
from services.engine.quantize.job import Budget, Job, Text, quantize
from services.engine.quantize.others import who_else_reads
from services.engine.quantize.report import Quality, Report, measured
from services.engine.quantize.shards import weight_bytes
from services.engine.quantize.work import work_folder
from services.engine.weight_format import GROUP_FILES, Method, WeightFormat

_INTERRUPTED = 130
"""The status of what Ctrl-C ends, as shells have it."""

_ACTIVATIONS = (Method.ABSMAX, Method.PERCENTILE, Method.MSE)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m services.engine.quantize`. What stops it is said in one line, with what remains."""
    arguments = _parser().parse_args(argv)
    try:
        out = Path(arguments.out).expanduser()
        report = made(arguments, out)
    except (ConfigurationError, OSError) as error:
        sys.exit(f"quantize: {_noted(error)}")
    except KeyboardInterrupt as stop:
        say(f"quantize: {_noted(stop, 'stopped')}")
        sys.exit(_INTERRUPTED)
    print(report.table())
    print(f"{out} is there; to serve it: python -m services --model {shlex.quote(str(out))}")


def _noted(error: BaseException, what: str = "") -> str:
    """What happened, and the notes on it."""
    return ". ".join([what or str(error), *getattr(error, "__notes__", ())])


def made(arguments: argparse.Namespace, out: Path) -> Report:
    """Makes the checkpoint, and returns what is told of it. Raises `ConfigurationError` for what cannot be done."""
    job = job_of(arguments)
    plan = job.plan() if job.budget is None else None
    if job.text is not None and plan is not None and not plan.needs_text:
        raise ConfigurationError(
            "--calibrate gives a text, and nothing that is asked for needs to see one; leave it out, or name a method that goes by it. To "
            "judge the checkpoint by a text, give it with --evaluate"
        )
    check_names(job.model, job.spec())
    text, judged = _texts(job, arguments)
    command, assignment = job.command(), None
    with work_folder(out, command) as work:
        if not work.is_begun:
            check_values(job.model, job.spec())
        if plan is None:
            assert text is not None
            assignment = job.within_budget(work, text, say=say)
            say(f"{assignment.bits:.3f} bits a weight: {assignment.rules}")
            work.keep_to(assignment.rules)
            job = replace(job, rules=assignment.rules)
            plan = job.plan()
        folder = quantize(job, plan, work, text if plan.needs_text else None, say=say)
        quality: Quality | None = None
        if judged is not None:
            say(f"judging by {len(judged.windows):,} windows of {judged.name}")
            progress = teller("windows", len(judged.windows))
            quality = measured(
                job.model, folder, judged.windows, judged.name, unpacking=plan.unpacking(), progress=progress
            )
        sizes = weight_bytes(job.model), weight_bytes(folder)
        report = Report(
            command | {"bits": arguments.budget},
            plan.summary(),
            who_else_reads(plan),
            num_weights(job.model),
            *sizes,
            quality,
            assignment,
        )
        report.write(folder)
        work.finish(folder, out)
    return report


@dataclass(frozen=True, slots=True)
class Judged:
    """What both models are judged by."""

    name: str
    windows: Sequence[Passage]


def _texts(job: Job, arguments: argparse.Namespace) -> tuple[Text | None, Judged | None]:
    """What the model is shown, and what it is judged by."""
    spec, judging = job.spec(), arguments.quality_tokens
    if arguments.evaluate is not None and judging:
        windows = replace(job, text=arguments.evaluate, num_tokens=judging).windows(spec).windows
        return (job.windows(spec) if job.text else None), Judged(arguments.evaluate.name, windows)
    if job.text is None:
        return None, None
    text = job.windows(spec, more=judging)
    return text, Judged(f"{job.text.name}, behind those of calibration", text.rest) if text.rest else None


def job_of(arguments: argparse.Namespace) -> Job:
    """What is asked for."""
    options = Options(
        percentile=arguments.percentile,
        act_order=arguments.act_order,
        damping=arguments.damping,
        strength=arguments.strength,
        activations=Method(arguments.activations),
    )
    budget = None
    if arguments.budget is not None:
        if arguments.calibrate is None:
            raise ConfigurationError("what layers cost is measured on a text: give one with --calibrate")
        budget = Budget(arguments.budget, arguments.formats, arguments.budget_tokens)
    return Job(
        model=models.resolve(arguments.model, progress=say),
        rules=arguments.scheme or str(arguments.config or ""),
        budget=budget,
        method=Method(arguments.method),
        options=options,
        text=arguments.calibrate,
        num_tokens=arguments.tokens,
        window=arguments.window,
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def teller(what: str, count: int) -> Callable[[int], None]:
    """Says every few seconds what is done of so many."""
    told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > 5 or done == count:
            told = time.monotonic()
            say(f"{what}: {done:,} of {count:,}")

    return tell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.engine.quantize",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a folder, or a name that `holdfast pull` knows")
    parser.add_argument("out", help="the folder that is to be made")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--scheme", help=f"a format, or rules `glob=format,...`: {', '.join(WeightFormat)}")
    asked.add_argument("--config", type=_groups, help="a file of groups of layers, .yaml, .toml or .json")
    asked.add_argument(
        "--budget",
        type=_number("number of bits", above=1, most=32),
        metavar="BITS",
        help="bits a weight of layers' matrices, scales included; formats are chosen layer by layer",
    )
    parser.add_argument(
        "--formats",
        type=_formats,
        default="int4-g64,int4-g32,int8,none",
        help="among which a budget chooses; one that does not fit a matrix is not taken for it",
    )
    parser.add_argument(
        "--budget-tokens", type=_count, default=1024, help="of the text, by which it is measured what layers cost"
    )
    parser.add_argument(
        "--method",
        choices=[*Method],
        default=Method.ABSMAX,
        help="how weights are rounded where a file does not say it",
    )
    parser.add_argument(
        "--calibrate", type=_file, metavar="FILE", help="a text that the model is shown, packed by gzip or not"
    )
    parser.add_argument("--tokens", type=_count, default=32768, help="how many of it")
    parser.add_argument(
        "--window", type=_count, help="tokens of a context; by default 1,024, or as many as the model takes"
    )
    parser.add_argument(
        "--activations",
        choices=[str(each) for each in _ACTIVATIONS],
        default="mse",
        help="how static scales of activations are found",
    )
    parser.add_argument(
        "--percentile",
        type=_number("percentage", above=50, most=100),
        default=Options().percentile,
        help="of weights, for that method",
    )
    parser.add_argument(
        "--damping",
        type=_number("number", above=0, most=1),
        default=Options().damping,
        help="of gptq, as a part of the mean square",
    )
    parser.add_argument(
        "--no-act-order", dest="act_order", action="store_false", help="gptq takes inputs as they stand"
    )
    parser.add_argument(
        "--strength", type=_number("number", above=0, most=1), default=Options().strength, help="of smoothquant"
    )
    parser.add_argument(
        "--evaluate",
        type=_file,
        metavar="FILE",
        help="a text to judge the checkpoint by; by default what follows in that of --calibrate",
    )
    parser.add_argument(
        "--quality-tokens", type=_count_or_none, default=16384, help="how many tokens of it; 0: it is not judged"
    )
    return parser


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def _groups(text: str) -> Path:
    if not text.endswith(GROUP_FILES):
        raise argparse.ArgumentTypeError(f"{text} ends in none of {', '.join(GROUP_FILES)}")
    return _file(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 2 on")
    return int(text)


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _number(what: str, *, above: float, most: float) -> Callable[[str], float]:
    """A type of options: a number of that range."""

    def number_of(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = above
        if not above < number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what} above {above:g} and up to {most:g}")
        return number

    return number_of


def _formats(text: str) -> tuple[WeightFormat, ...]:
    known = [
        each for each in WeightFormat if each is not WeightFormat.INT8_STATIC
    ]  # which needs another pass for its scales
    names = text.split(",")
    if wrong := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
    return tuple(WeightFormat(name) for name in names)


if __name__ == "__main__":
    main()
