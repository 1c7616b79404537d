"""What a model computes, one function an op.

Each function dispatches on the device of its tensors. What stands here in plain torch runs on any device and is the
specification: a kernel for one device is right when it agrees with it.

Shapes: N tokens of the step, S sequences, H query heads, K kv heads, G = H / K, D head size, Q query tokens, C cached
tokens that a query may see, B blocks, T tokens of a block.
"""
