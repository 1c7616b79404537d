"""Messages and stubs generated from protos/holdfast/v1 by `make protos`; never edited."""
