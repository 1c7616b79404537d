"""The gateway: takes requests over gRPC and HTTP, gives them to the log, and streams the answers back as text.

It owns a request from the call until the log has it, and an answer from the token topic to the client. A request's way
through it is the list of its files: `servicer`, or `web` and `http` with `bodies`, `openai` → `generate` (with
`validation`, `admission`, `tokenizer`, `routing`) → the log → `streams` (with `holdfast.accept`) → `choice` (with
`detokenize`, `stops`) → `answer` → the client; `cancel` tells the log what nobody wants any more, `observation` and
`metrics` tell of it all, `watch` and `readiness` of what is missing.
It promises that an accepted request is in the log, that a stream shows only tokens that every reader of the log would
accept, each once and in order, and that a stream that breaks says so.
"""
