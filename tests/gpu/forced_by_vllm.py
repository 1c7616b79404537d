"""What vLLM predicts of given tokens: `python -m tests.gpu.forced_by_vllm FOLDER OUT`, the tokens on its input, a JSON list.

Writes the log-probability of each token but the first, a JSON list too. A process of its own, as vLLM does not give a GPU back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str, out: str) -> None:
    from vllm import LLM, SamplingParams

    ids = json.load(sys.stdin)
    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=1024,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=2**30,
        disable_log_stats=True,
    )
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    rows = answer.prompt_logprobs[1:]
    Path(out).write_text(json.dumps([row[token].logprob for row, token in zip(rows, ids[1:], strict=True)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
