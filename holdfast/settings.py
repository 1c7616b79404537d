"""Settings: frozen models, read once from flags, environment and a file, every bad value named at once.

A service's settings are a subclass of `Settings` with a docstring under each field, which becomes the flag's help:

    class GatewaySettings(Settings, env_prefix="HOLDFAST_GATEWAY_"):
        max_streams: Annotated[int, Field(ge=1)] = 1024
        \"\"\"How many streams may be open at once.\"\"\"

What is given first wins: a flag (`--max-streams 64`), the environment (`HOLDFAST_GATEWAY_MAX_STREAMS`), the table of
the service (`[gateway]`) in the TOML file that `HOLDFAST_CONFIG` names, the default. An unknown name in any of them
stops the start, as a bad value does, a name of no service too: nothing falls back silently. All services can share one
file and one environment, each reads what is its own.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from holdfast.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PREFIX = "HOLDFAST_"
FILE_VARIABLE = "HOLDFAST_CONFIG"

SERVICES = ("gateway", "tokenizer", "engine", "kvstore")
"""Those that have settings: each has a table in the file, and variables that begin with its name."""

OF_ALL_SERVICES = ("model", "served_model_name", "ask", "exit")
"""What is set without a service's name, for all of them in one process."""

OTHER_VARIABLES = ("CONFIG", "CACHE", "ADDRESS", "LOG_LEVEL", "LOG_FORMAT", "TEST_KAFKA", "SHARED")
"""What else is read from `HOLDFAST_...`: by every program, the models, the client, the logs, the tests."""


def _program() -> str:
    """This process's program, as one types it."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec is not None else Path(sys.argv[0]).name


class Settings(BaseSettings):
    """The settings of one service, or (with nested `Settings` as fields) of several in one process."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        # HOLDFAST_GATEWAY_MAX_STREAMS is `max_streams` of the field `gateway`, where a field is itself Settings.
        env_nested_delimiter="_",
        env_nested_max_split=1,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        cli_prog_name=_program(),
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags stand before these; no .env files, no secret files."""
        return init_settings, env_settings, _FromFile(settings_cls, cls._table(_read_file()))

    @classmethod
    def _prefix(cls) -> str:
        return cls.model_config.get("env_prefix", "") or PREFIX

    @classmethod
    def _service(cls) -> str:
        """The service whose settings these are; empty for several in one process."""
        return cls._prefix().removeprefix(PREFIX).removesuffix("_").lower()

    @classmethod
    def _table(cls, content: dict[str, Any]) -> dict[str, Any]:
        """What of a file's content is for these settings."""
        service = cls._service()
        if not service:
            return content
        table = content.get(service, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"{os.environ[FILE_VARIABLE]}: {service} is a table, [{service}], not {table!r}")
        return table


class _FromFile(InitSettingsSource):
    """What stands in the file."""


def _read_file() -> dict[str, Any]:
    """The content of the file that is named; nothing where none is."""
    file = os.environ.get(FILE_VARIABLE)
    if file is None:
        return {}
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{FILE_VARIABLE} names {file}, which cannot be read: {error.strerror}") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigurationError(f"{file} is not TOML: {error}") from error


S = TypeVar("S", bound=Settings)


def load(kind: type[S], argv: Sequence[str] = ()) -> S:
    """The settings of this process. `--help` prints every setting and exits.

    Raises:
        ConfigurationError: naming every value that is wrong and every name that is unknown, and where it was given.
    """
    flags, problems = _known_flags(kind, argv)
    problems += _unknown_tables(kind)
    settings: S | None = None
    try:
        settings = CliApp.run(kind, cli_args=flags)
    except ValidationError as error:
        problems += [_problem(kind, details, argv) for details in error.errors(include_url=False)]
    except (SettingsError, ValueError) as error:
        problems.append(str(error))
    problems += _unknown_variables(kind)
    if settings is None or problems:
        raise ConfigurationError("; ".join(problems))
    return settings


def _known_flags(kind: type[Settings], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are flags of settings, with their values, and what is wrong with the others. The library's
    parser would stop at the first of those, and say nothing of the rest."""
    takes_value = _flags(kind) | {"-h": False, "--help": False}
    known: list[str] = []
    problems: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        flag, equals, _ = argument.partition("=")
        value = [rest.pop(0)] if not equals and takes_value.get(flag, True) and rest and rest[0][:2] != "--" else []
        if not argument.startswith("-"):
            problems.append(f"{argument}: a setting is given as --name value")
            rest = value + rest
        elif flag not in takes_value:
            problems.append(_unknown(flag, takes_value))
        elif takes_value[flag] and not equals and not value:
            problems.append(f"{flag}: needs a value")
        else:
            known += [argument, *value]
    return known, problems


def _flags(kind: type[Settings], prefix: str = "") -> dict[str, bool]:
    """Every flag, and whether it takes a value."""
    flags: dict[str, bool] = {}
    for name, field in kind.model_fields.items():
        path = prefix + name.replace("_", "-")
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            flags |= _flags(field.annotation, f"{path}.")
        elif field.annotation in (bool, bool | None):
            flags |= {f"--{path}": False, f"--no-{path}": False}
        else:
            flags[f"--{path}"] = True
    return flags


def _variables(kind: type[Settings]) -> list[str]:
    return [kind._prefix() + name.upper() for name in kind.model_fields]


def _unknown(name: str, known: Iterable[str]) -> str:
    known = list(known)
    start = os.path.commonprefix([name, *known])  # says nothing about which is meant
    near = difflib.get_close_matches(name.removeprefix(start), [each.removeprefix(start) for each in known], n=1)
    return f"{name}: no such setting; {f'did you mean {start}{near[0]}?' if near else '--help lists them'}"


def _problem(kind: type[Settings], details: ErrorDetails, argv: Sequence[str]) -> str:
    if details["type"] != "extra_forbidden":
        return f"{_where(kind, details['loc'], argv)}: {details['msg']}, not {details['input']!r}"
    path = [str(part) for part in details["loc"]]
    variable = kind._prefix() + "_".join(path).upper()
    if variable in os.environ:
        return _unknown(
            variable, [PREFIX + flag[2:].replace(".", "_").replace("-", "_").upper() for flag in _flags(kind)]
        )
    in_file = kind.model_fields if len(path) == 1 else [flag[2:].replace("-", "_") for flag in _flags(kind)]
    return _unknown_in_file(kind, path, in_file)


def _unknown_in_file(kind: type[Settings], path: Sequence[str], known: Iterable[str]) -> str:
    table = [service] if (service := kind._service()) else []
    named = _unknown(".".join([*table, *path]), [".".join([*table, name]) for name in known])
    return f"{os.environ.get(FILE_VARIABLE, 'settings')}: {named}"


def listening(settings: Settings) -> Iterator[str]:
    """The addresses on which this process will listen: every `address` and `..._address`."""
    for name in type(settings).model_fields:
        given = getattr(settings, name)
        if isinstance(given, Settings):
            yield from listening(given)
        elif name.rpartition("_")[2] == "address" and given:
            yield given


def flags_of(settings: Settings, value: object) -> list[str]:
    """The flags of the settings that have this value."""
    flags = []
    for name in type(settings).model_fields:
        given = getattr(settings, name)
        flag = "--" + name.replace("_", "-")
        if isinstance(given, Settings):
            flags += [f"{flag}.{inner.removeprefix('--')}" for inner in flags_of(given, value)]
        elif given == value:
            flags.append(flag)
    return flags


def _unknown_tables(kind: type[Settings]) -> list[str]:
    """What stands in the file outside of tables, and tables, that no service reads."""
    if not kind._service():  # several services in one process: pydantic itself refuses what it cannot place
        return []
    known = [kind._service(), *SERVICES, *OF_ALL_SERVICES]
    file = os.environ.get(FILE_VARIABLE)
    return [f"{file}: {_unknown(name, known)}" for name in _read_file() if name not in known]


_OF_KUBERNETES = re.compile(r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")
"""What Kubernetes tells every container of a service that is called holdfast-something."""


def _unknown_variables(kind: type[Settings]) -> list[str]:
    """Variables that begin like this service's settings and are none of them, and those that are of no service."""
    own, others = _variables(kind), {*SERVICES, *_parts(kind)} - {kind._service()}
    problems = []
    for name in sorted(name for name in os.environ if name.startswith(PREFIX) and not _OF_KUBERNETES.search(name)):
        service, _, rest = name.removeprefix(PREFIX).lower().partition("_")
        if service in others and rest:
            continue  # that service's own; of a part, pydantic refuses what it cannot place
        known = own if service == kind._service() else own + _variables_of_no_service(name, {*others, kind._service()})
        if name not in known:
            problems.append(_unknown(name, known))
    return problems


def _parts(kind: type[Settings]) -> list[str]:
    fields = kind.model_fields.items()
    return [
        name for name, field in fields if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
    ]


def _variables_of_no_service(name: str, services: Iterable[str]) -> list[str]:
    """Those, and what this name would be with the name of the service that is nearest."""
    service, _, rest = name.removeprefix(PREFIX).partition("_")
    nearest = difflib.get_close_matches(service.lower(), services, n=1) if rest else []
    meant = [f"{each.upper()}_{rest}" for each in nearest]
    return [PREFIX + each.upper() for each in (*OF_ALL_SERVICES, *OTHER_VARIABLES, *meant)]


def _where(kind: type[Settings], loc: tuple[int | str, ...], argv: Sequence[str]) -> str:
    """Where the value of a field was given, as its giver would write it."""
    path = [str(part) for part in loc]
    flag = "--" + ".".join(path).replace("_", "-")
    if any(argument.split("=")[0] == flag for argument in argv):
        return flag
    variable = kind._prefix() + "_".join(path).upper()
    if variable in os.environ:
        return variable
    named = [service, *path] if (service := kind._service()) else path
    if _stands(named, _read_file()):
        return f"{os.environ[FILE_VARIABLE]}: {'.'.join(named)}"
    return f"{'.'.join(path)} (flag {flag}, variable {variable})"


def _stands(path: Sequence[str], content: object) -> bool:
    """Whether the file's content has something at this path."""
    for name in path:
        if not isinstance(content, dict):
            return True
        if name not in content:
            return False
        content = content[name]
    return True
