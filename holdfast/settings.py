"""Settings: frozen models, read once from flags, environment and a file, every bad value named at once.

A service's settings are a subclass of `Settings` with a docstring under each field, which becomes the flag's help:

    class GatewaySettings(Settings, env_prefix="HOLDFAST_GATEWAY_"):
        max_streams: Annotated[int, Field(ge=1)] = 1024
        \"\"\"How many streams may be open at once.\"\"\"

What is given first wins: a flag (`--max-streams 64`), the environment (`HOLDFAST_GATEWAY_MAX_STREAMS`), the table of
the service (`[gateway]`) in the TOML file that `HOLDFAST_CONFIG` names, the default. An unknown name in any of them
stops the start, as a bad value does: nothing falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from holdfast.errors import ConfigurationError

PREFIX = "HOLDFAST_"
FILE_VARIABLE = "HOLDFAST_CONFIG"


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
        file = os.environ.get(FILE_VARIABLE)
        if file is None:
            return init_settings, env_settings
        table = tuple(cls._prefix().removeprefix(PREFIX).lower().split("_")[:-1])
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(file), toml_table_header=table)

    @classmethod
    def _prefix(cls) -> str:
        return cls.model_config.get("env_prefix", "") or PREFIX


S = TypeVar("S", bound=Settings)


def load(kind: type[S], argv: Sequence[str] = ()) -> S:
    """The settings of this process. `--help` prints every setting and exits.

    Raises:
        ConfigurationError: naming every value that is wrong, and where it was given.
    """
    file = os.environ.get(FILE_VARIABLE)
    if file is not None and not Path(file).is_file():
        raise ConfigurationError(f"{FILE_VARIABLE} names {file}, which is not a file")
    try:
        settings = CliApp.run(kind, cli_args=list(argv))
    except ValidationError as error:
        problems = [
            f"{_where(kind, problem['loc'], argv)}: {problem['msg']}, not {problem['input']!r}"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigurationError("; ".join(problems)) from error
    except (SettingsError, ValueError) as error:
        raise ConfigurationError(str(error)) from error
    if unknown := _unknown_variables(kind):
        raise ConfigurationError(f"{', '.join(unknown)}: no such setting; --help lists them")
    return settings


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


def _unknown_variables(kind: type[Settings]) -> list[str]:
    """Variables that begin like this service's settings and are none of them."""
    prefix = kind._prefix()
    if prefix == PREFIX:  # several services in one process: pydantic itself refuses what it cannot place
        return []
    known = {prefix + name.upper() for name in kind.model_fields}
    return sorted(name for name in os.environ if name.startswith(prefix) and name not in known)


def _where(kind: type[Settings], loc: tuple[int | str, ...], argv: Sequence[str]) -> str:
    """Where the value of a field was given, as its giver would write it."""
    path = [str(part) for part in loc]
    flag = "--" + ".".join(path).replace("_", "-")
    if any(argument.split("=")[0] == flag for argument in argv):
        return flag
    variable = kind._prefix() + "_".join(path).upper()
    if variable in os.environ:
        return variable
    return f"{'.'.join(path)} (flag {flag}, variable {variable})"
