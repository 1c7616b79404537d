"""The parts that decoders are built of. Each takes its tensors from a `Weights` when it is made, in the names and shapes
of the checkpoint, and computes through `ops` and its `Format` when it is called.

Layers are plain objects: they hold no training state, and nothing is done to them after they are made.
"""
