"""Makes a checkpoint in few bits of one that is not: `python -m services.engine.quantize MODEL OUT --scheme int4-g64`.

    --scheme   one format for the matrices of all layers, or rules over names, as `--quantization` of the engine takes them
    --config   a file of groups of layers
    --budget   so many bits a weight: which layer gets which format follows from what each costs

What is written is read by the engine, by transformers with the package compressed-tensors, and by others that know that format. Weights come
from the disk and go there layer by layer, so that a model may be larger than memory; finished layers are kept in OUT.work, from where
the same command goes on. OUT is there when it is whole.
"""
