"""The ops as Triton kernels, one file an op. What stands in `ops` in plain torch is the specification; each kernel is
tested against it under Triton's interpreter on a CPU, compiled for sm_90a without a GPU, and compared again on one.

Every kernel takes what varies from step to step from the device's memory, and its grid is an upper bound known before:
so a step is captured in a CUDA graph once and replayed with other sequences, lengths and tokens.

Shapes: N tokens of the step, S works, H query heads, K kv heads, G = H / K, D head size, T tokens of a block.
"""
