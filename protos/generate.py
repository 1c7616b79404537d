"""Generates `holdfast/v1` from the contract: `python protos/generate.py [folder]` (by default the checkout itself).

Messages and their types come from every file; stubs, servicers and their types only from files that have a service.
The versions of the generators are those of constraints.txt: what they write depends on them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
"""They lie beside this interpreter, whether or not its environment is activated."""


def generate(out: Path) -> None:
    """Writes `out/holdfast/v1/*_pb2*.py[i]` over what is there.

    Raises:
        SystemExit: the compiler refused a file, and has said why on stderr.
    """
    files = sorted(PROTOS.glob("holdfast/v1/*.proto"))
    with_service = [file for file in files if has_service(file)]
    compile_protos(files, f"--python_out={out}", f"--mypy_out=quiet:{out}")
    compile_protos(with_service, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}")


def has_service(file: Path) -> bool:
    return any(line.startswith("service ") for line in file.read_text().splitlines())


def compile_protos(files: list[Path], *outputs: str) -> None:
    options = [f"-I{PROTOS}", f"-I{WELL_KNOWN}"]
    options += [f"--plugin={name}={Path(sys.executable).with_name(name)}" for name in PLUGINS]
    code = protoc.main(["protoc", *options, *outputs, *(str(file.relative_to(PROTOS)) for file in files)])
    if code:
        sys.exit(code)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
