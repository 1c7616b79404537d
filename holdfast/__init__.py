"""What every service shares, and all that users install: the client, the command, the log and the contract.

`holdfast.client` is the client, `holdfast.bus` the log's promise, `holdfast.errors` every error and what it is on the
wire, `holdfast.v1` the messages. Nothing here imports a service or a model's framework.
"""

__version__ = "0.1.0"
