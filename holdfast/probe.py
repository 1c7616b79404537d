"""Asks one service whether it is ready: `python -m holdfast.probe 127.0.0.1:50051`, the health check of the images.

Ends with 0 where the service says SERVING, otherwise with 1 and one line that says why. (Kubernetes asks grpc.health.v1
itself and needs no program.)
"""

from __future__ import annotations

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(address: str, *, timeout: float) -> str | None:
    """Why the service at `host:port` is not ready; None where it is. Answers within `timeout` seconds."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    state: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if state == "SERVING" else state


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m holdfast.probe", description="Ask a service whether it is ready.")
    parser.add_argument("address", help="host:port of its gRPC server")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait for an answer (%(default)s)")
    arguments = parser.parse_args()
    if problem := probe(arguments.address, timeout=arguments.timeout):
        sys.exit(f"{arguments.address} is not ready: {problem}")


if __name__ == "__main__":
    main()
