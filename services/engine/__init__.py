"""The engine: takes requests from the log, computes their tokens, and writes them back.

It owns sequences from the moment it takes them until their last token is acked by the log. A request's way through it
is the list of its files: `intake` → `sequence` → `scheduler` (with `blocks`) → `batch` → `model_runner` (with `state`,
`kv_cache`, `models/`) → `sampler` → `emit`; `loop` is the step that joins them. The files that decide (`sequence`,
`blocks`, `scheduler`, `batch`) are plain Python: no tensors, no clock, no I/O.
"""
