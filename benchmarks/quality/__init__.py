"""What a choice of formats costs in quality, beside an engine without it.

    python -m benchmarks.quality --text wikitext2_test.raw.gz --with quantization=fp8 --with kv_cache_dtype=int8
    python -m benchmarks.quality --text wikitext2_test.raw.gz --chat mt_bench.jsonl.gz --lookups 128 --with quantization=fp8 \\
        --sensitivity fp8 --plots plots --out quality.json

Each `--with` is an engine's settings, separated by spaces, on top of those of `--reference`; `model=FOLDER` among them
takes the weights from another folder. All of them are made to compute the same tokens, side by side, each passage from an
empty context, in chunks over the paged cache, so that a chunk reads what the chunks before it left there:

* windows of a text, of which every token but the first counts;
* with --chat, conversations as the model's template has them, each answered by the reference, greedily: the tokens of
  the answer count, the end among them. "Agreed" is how many of them an engine says itself before it says another;
* with --lookups, a list of names and numbers and the question for one of them: whether an engine, greedy, gives the
  number and nothing else.

--sensitivity quantizes one layer at a time by the rules given. Perplexity, KL (nats, from the reference), and the others are
defined in `services/engine/quality/scores.py`; bits and bytes are those of the buffers that a loaded model holds.
"""
