"""The engine: takes requests from the log, computes their tokens, and writes them back.

It owns sequences from the moment it takes them until their last token is acked by the log. A request's way through it
is the list of its files: `intake` → `validation` → `sequence` → `scheduler` (`waiting` → `admission` → `running` →
`assignment`, with `prefixes`, `blocks`, `prefill`, `pace`; `offload` for what the KV store has) → `batch` →
`model_runner` (with `state`, `kv_cache`, `models/`) → `sampler` → `emit` → `commits`. `loop` is the step that joins them,
`requests` what is known of a request meanwhile; `build` makes what computes, `engine` joins it to the log, `__main__`
composes both. The files that decide (`sequence`, `blocks`, `batch`, `scheduler` and its parts) are plain Python: no
tensors, no clock, no I/O. Two threads meet in `loop` and nowhere else: the event loop, and the step thread, which owns
the scheduler and the device.
"""
