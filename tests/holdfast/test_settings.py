"""Settings: where values come from, and how wrong ones are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from holdfast.errors import ConfigurationError
from holdfast.settings import OF_ALL_SERVICES, OTHER_VARIABLES, SERVICES, Settings, flags_of, load
from services.settings import MeshSettings
from tests.conftest import ROOT


class StationSettings(Settings, env_prefix="HOLDFAST_STATION_"):
    """A service that does not exist."""

    max_trains: Annotated[int, Field(ge=1)] = 5
    """How many trains may wait."""
    gauge: Literal["normal", "narrow"] = "normal"
    """How wide the rails are."""


class LineSettings(Settings, env_prefix="HOLDFAST_"):
    """Several services in one process."""

    name: str = "coast"
    """The line's name."""
    station: StationSettings = Field(default_factory=StationSettings)
    """Its station."""


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOLDFAST_CONFIG", raising=False)


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that HOLDFAST_CONFIG names."""
    path = tmp_path / "holdfast.toml"
    monkeypatch.setenv("HOLDFAST_CONFIG", str(path))
    return path


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is given closest to the start wins."""
    assert load(StationSettings).max_trains == 5
    file = tmp_path / "holdfast.toml"
    file.write_text('[station]\nmax_trains = 6\ngauge = "narrow"\n')
    monkeypatch.setenv("HOLDFAST_CONFIG", str(file))
    assert load(StationSettings) == StationSettings(max_trains=6, gauge="narrow")
    monkeypatch.setenv("HOLDFAST_STATION_MAX_TRAINS", "7")
    assert load(StationSettings).max_trains == 7
    assert load(StationSettings, ["--max-trains", "8"]).max_trains == 8


def test_every_bad_value_is_named_at_once_with_where_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start tells all that is wrong."""
    monkeypatch.setenv("HOLDFAST_STATION_MAX_TRAINS", "many")
    with pytest.raises(ConfigurationError) as caught:
        load(StationSettings, ["--gauge", "broad"])
    assert "HOLDFAST_STATION_MAX_TRAINS" in str(caught.value)
    assert "'many'" in str(caught.value)
    assert "--gauge" in str(caught.value)
    assert "'broad'" in str(caught.value)


def test_all_that_is_wrong_is_named_at_once_unknown_names_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flags, variables and lines of the file, values and names, each with the name that was meant where one is near."""
    file = tmp_path / "holdfast.toml"
    file.write_text('[station]\nguage = "narrow"\n')
    monkeypatch.setenv("HOLDFAST_CONFIG", str(file))
    monkeypatch.setenv("HOLDFAST_STATION_MAX_TRIANS", "7")
    argv = ["--max-trains", "0", "--gage", "narrow", "--colour=red", "stray", "--guard"]
    with pytest.raises(ConfigurationError) as caught:
        load(StationSettings, [*argv, "--gauge"])
    assert sorted(str(caught.value).split("; ")) == sorted(
        [
            "--max-trains: Input should be greater than or equal to 1, not '0'",
            *("--gage: no such setting", "did you mean --gauge?"),
            *("--colour: no such setting", "--help lists them"),
            "stray: a setting is given as --name value",
            *("--guard: no such setting", "--help lists them"),
            "--gauge: needs a value",
            *(f"{file}: station.guage: no such setting", "did you mean station.gauge?"),
            *("HOLDFAST_STATION_MAX_TRIANS: no such setting", "did you mean HOLDFAST_STATION_MAX_TRAINS?"),
        ]
    )


def test_a_nested_setting_that_is_unknown_is_named_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag and a variable of a part."""
    monkeypatch.setenv("HOLDFAST_STATION_MAX_TRIANS", "7")
    with pytest.raises(ConfigurationError) as caught:
        load(LineSettings, ["--station.guage", "narrow"])
    assert "--station.guage: no such setting; did you mean --station.gauge?" in str(caught.value)
    assert "HOLDFAST_STATION_MAX_TRIANS: no such setting; did you mean HOLDFAST_STATION_MAX_TRAINS?" in str(
        caught.value
    )


def test_what_kubernetes_tells_of_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container beside a service called holdfast-station gets such variables; they say nothing to us."""
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_ADDR"):
        monkeypatch.setenv(f"HOLDFAST_STATION_{name}", "10.0.0.1")
    assert load(StationSettings) == StationSettings()


@pytest.mark.parametrize("kind", [StationSettings, LineSettings])
def test_an_unknown_variable_stops_the_start(monkeypatch: pytest.MonkeyPatch, kind: type[Settings]) -> None:
    """A misspelt variable is an error, not a silent default."""
    monkeypatch.setenv("HOLDFAST_STATION_MAX_TRIANS", "7")
    with pytest.raises(ConfigurationError, match="(?i)max_trians"):
        load(kind)


def test_an_unknown_flag_stops_the_start() -> None:
    """So does a misspelt flag."""
    with pytest.raises(ConfigurationError, match="--max-trians"):
        load(StationSettings, ["--max-trians", "7"])


def test_an_unknown_name_in_the_file_stops_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So does a misspelt line of the file; another service's table does not."""
    file = tmp_path / "holdfast.toml"
    file.write_text("[station]\nmax_trians = 6\n[engine]\nships = 3\n")
    monkeypatch.setenv("HOLDFAST_CONFIG", str(file))
    with pytest.raises(ConfigurationError, match="max_trians"):
        load(StationSettings)


@pytest.mark.parametrize("kind", [StationSettings, LineSettings])
def test_a_file_without_the_services_table_means_defaults(file: Path, kind: type[Settings]) -> None:
    """All services share one file, and each has a table only where it needs one."""
    file.write_text("[engine]\nthreads = 3\n" if kind is StationSettings else "")
    assert load(kind) == kind()


def test_a_name_of_no_service_in_the_file_stops_the_start(file: Path) -> None:
    """A misspelt table would set nothing, in silence."""
    file.write_text("modle = 'tiny'\n[gatewy]\nmax_streams = 3\n[tokenizer]\n")
    with pytest.raises(ConfigurationError) as caught:
        load(StationSettings)
    assert str(caught.value) == (
        f"{file}: modle: no such setting; did you mean model?; {file}: gatewy: no such setting; did you mean gateway?"
    )
    file.write_text("[staton]\ngauge = 'narrow'\n")
    with pytest.raises(ConfigurationError, match="staton: no such setting; did you mean station"):
        load(LineSettings)


@pytest.mark.parametrize("kind", [StationSettings, LineSettings])
def test_a_variable_of_no_service_stops_the_start(monkeypatch: pytest.MonkeyPatch, kind: type[Settings]) -> None:
    """What nobody reads is a mistake; what another service or program reads is not."""
    for name in ("HOLDFAST_ADDRESS", "HOLDFAST_LOG_LEVEL", "HOLDFAST_GATEWAY_ADDRESS", "HOLDFAST_KVSTORE_ANYTHING"):
        monkeypatch.setenv(name, "x")
    load(kind)
    monkeypatch.setenv("HOLDFAST_GATWAY_ADDRESS", "x")
    monkeypatch.setenv("HOLDFAST_LOG_LEVLE", "x")
    monkeypatch.setenv("HOLDFAST_STATIN_GAUGE", "x")
    with pytest.raises(ConfigurationError) as caught:
        load(kind)
    assert str(caught.value) == (
        "HOLDFAST_GATWAY_ADDRESS: no such setting; did you mean HOLDFAST_GATEWAY_ADDRESS?; "
        "HOLDFAST_LOG_LEVLE: no such setting; did you mean HOLDFAST_LOG_LEVEL?; "
        "HOLDFAST_STATIN_GAUGE: no such setting; did you mean HOLDFAST_STATION_GAUGE?"
    )


def test_every_name_that_is_read_is_known() -> None:
    """The settings of all services, and each variable that a program here reads by its name."""
    assert {*SERVICES, *OF_ALL_SERVICES} == set(MeshSettings.model_fields)
    sources = [*(ROOT / "holdfast").glob("*.py"), *(ROOT / "deploy/kafka").glob("*.py"), ROOT / "tests/conftest.py"]
    read = {name for source in sources for name in re.findall(r'"HOLDFAST_([A-Z_]*[A-Z])"', source.read_text())}
    assert read == set(OTHER_VARIABLES)


@pytest.mark.parametrize("kind", [StationSettings, LineSettings])
def test_a_bad_value_in_the_file_is_named_with_its_file_and_table(file: Path, kind: type[Settings]) -> None:
    """Not by the flag that one did not give."""
    file.write_text("[station]\nmax_trains = 0\n")
    with pytest.raises(ConfigurationError) as caught:
        load(kind)
    assert str(caught.value) == (f"{file}: station.max_trains: Input should be greater than or equal to 1, not 0")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[station\n", "is not TOML: Expected ']'"),
        (b"# \xff", "is not TOML: 'utf-8' codec can't decode"),
        (b"station = 3", ": station is a table, [station], not 3"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named(file: Path, content: bytes, why: str) -> None:
    """With what is wrong with it."""
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load(StationSettings)
    assert str(caught.value).startswith(str(file))
    assert why in str(caught.value)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HOLDFAST_CONFIG must name a file."""
    monkeypatch.setenv("HOLDFAST_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml"):
        load(StationSettings)


def test_a_nested_service_reads_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several services in one process are set by the names that each has alone."""
    monkeypatch.setenv("HOLDFAST_STATION_MAX_TRAINS", "9")
    settings = load(LineSettings, ["--station.gauge", "narrow", "--name", "hill"])
    assert settings == LineSettings(name="hill", station=StationSettings(max_trains=9, gauge="narrow"))


def test_settings_cannot_be_changed_after_the_start() -> None:
    """They are read once."""
    settings = StationSettings()
    with pytest.raises(ValidationError):
        settings.max_trains = 3  # type: ignore[misc]


def test_a_value_leads_back_to_its_flag() -> None:
    """Nested ones too."""
    assert flags_of(LineSettings(station=StationSettings(max_trains=7)), 7) == ["--station.max-trains"]
    assert flags_of(LineSettings(), "coast") == ["--name"]
    assert flags_of(LineSettings(), "nowhere") == []
