"""Makes a checkpoint in few bits of one that is not: `python -m services.engine.quantize MODEL OUT --scheme int4-g64`.

    --scheme   one format for the matrices of all layers, or rules over names, as `--quantization` of the engine takes them
    --config   a file of groups of layers
    --budget   so many bits a weight: which layer gets which format follows from what each costs

What is written is in the format of compressed-tensors. The engine reads all of it; transformers (5.23, with compressed-tensors 0.20) and vLLM
(0.26) read less, and the report ends by saying which of them read this checkpoint and what keeps the others from it. transformers: no mixture of
experts, no zero points (`-asym`), no embedding in four or three bits, `fp8-block` only where inputs are multiples of 128; but for a mixture, it
reads one format throughout if it unpacks all (`CompressedTensorsConfig(dequantize=True)`). vLLM, by its source: no embedding in eight bits or with
zero points, no three bits, `fp8-block` only where inputs are multiples of 128, and outputs of what it keeps as one.

Weights come from the disk and go there layer by layer, so that a model may be larger than memory; finished layers are kept in OUT.work, from
where the same command goes on. OUT is there when it is whole.
"""
