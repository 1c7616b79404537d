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
from services.engine.quantize.job import Budget, Job, Text, quantize_model
from services.engine.quantize.others import who_else_reads
from services.engine.quantize.plan import Plan
from services.engine.quantize.report import Quality, Report, measured_quality
from services.engine.quantize.shards import weight_bytes
from services.engine.quantize.work import work_folder
from services.engine.weight_format import GROUP_FILES, Method, WeightFormat

_INTERRUPTED = 130
"""The status of what Ctrl-C ends, as shells have it."""

_FORMATS = "int4-g64,int4-g32,int8,none"
_TOKENS, _BUDGET_TOKENS = 32768, 1024

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
    _require_use(arguments, job, plan)
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
        folder = quantize_model(job, plan, work, text if plan.needs_text else None, say=say)
        quality: Quality | None = None
        if judged is not None:
            say(f"judging by {len(judged.windows):,} windows of {judged.name}")
            progress = teller("windows", len(judged.windows))
            quality = measured_quality(
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


def _require_use(arguments: argparse.Namespace, job: Job, plan: Plan | None) -> None:
    """Raises `ConfigurationError` for an option that changes nothing of what is asked for."""
    if job.text is not None and plan is not None and not plan.needs_text:
        raise ConfigurationError(
            "--calibrate gives a text, and nothing that is asked for needs to see one; leave it out, or name a method that goes by it. To "
            "judge the checkpoint by a text, give it with --evaluate"
        )
    methods = frozenset({job.method}) if plan is None else plan.methods
    is_shown, is_judged = job.text is not None, job.text is not None or arguments.evaluate is not None
    uses: dict[str, tuple[bool, str]] = {
        "formats": (plan is None, "--budget"),
        "budget_tokens": (plan is None, "--budget"),
        "tokens": (is_shown, "--calibrate"),
        "window": (is_judged, "--calibrate or --evaluate"),
        "activations": (plan is not None and plan.needs_static_scales, "int8-static"),
        "percentile": (Method.PERCENTILE in methods, "the method percentile"),
        "damping": (Method.GPTQ in methods, "the method gptq"),
        "act_order": (Method.GPTQ in methods, "the method gptq"),
        "strength": (Method.SMOOTHQUANT in methods, "the method smoothquant"),
        "evaluate": (arguments.quality_tokens > 0, "--quality-tokens above 0"),
    }
    for name, (is_used, what) in uses.items():
        if getattr(arguments, name) is not None and not is_used:
            option = "--no-act-order" if name == "act_order" else f"--{name.replace('_', '-')}"
            raise ConfigurationError(f"{option} changes nothing without {what}; leave it out, or ask for that")


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
    told = {name: getattr(arguments, name) for name in ("percentile", "act_order", "damping", "strength")}
    told["activations"] = arguments.activations and Method(arguments.activations)
    options = Options(**{name: value for name, value in told.items() if value is not None})
    budget = None
    if arguments.budget is not None:
        if arguments.calibrate is None:
            raise ConfigurationError("what layers cost is measured on a text: give one with --calibrate")
        formats, tokens = arguments.formats or _formats(_FORMATS), arguments.budget_tokens or _BUDGET_TOKENS
        budget = Budget(arguments.budget, formats, tokens)
    return Job(
        model=models.resolve(arguments.model, progress=say),
        rules=arguments.scheme or str(arguments.config or ""),
        budget=budget,
        method=Method(arguments.method),
        options=options,
        text=arguments.calibrate,
        num_tokens=arguments.tokens or _TOKENS,
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
        help=f"among which a budget chooses; one that does not fit a matrix is not taken for it; by default {_FORMATS}",
    )
    parser.add_argument(
        "--budget-tokens",
        type=_count,
        help=f"of the text, by which it is measured what layers cost; by default {_BUDGET_TOKENS:,}",
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
    parser.add_argument("--tokens", type=_count, help=f"how many of it; by default {_TOKENS:,}")
    parser.add_argument(
        "--window", type=_count, help="tokens of a context; by default 1,024, or as many as the model takes"
    )
    parser.add_argument(
        "--activations",
        choices=[str(each) for each in _ACTIVATIONS],
        help="how static scales of activations are found",
    )
    parser.add_argument(
        "--percentile",
        type=_number("percentage", above=50, most=100),
        help="of weights, for that method",
    )
    parser.add_argument(
        "--damping",
        type=_number("number", above=0, most=1),
        help="of gptq, as a part of the mean square",
    )
    parser.add_argument(
        "--no-act-order", dest="act_order", action="store_const", const=False, help="gptq takes inputs as they stand"
    )
    parser.add_argument("--strength", type=_number("number", above=0, most=1), help="of smoothquant")
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
