"""What is done to a model's weights before and while they are rounded, so that rounding costs less than to the nearest alone.

A text goes through the model layer by layer (`stream`). What each matrix of a layer is given is seen by a format of its own (`observe`), and
kept as sums (`statistics`); by these a layer's matrices are scaled against each other (`smoothing`), given scales (`scales`) and rounded
(`gptq`). Which of this is done to which matrix says a `Choice`, and `layer` does it. One layer's weights are in memory at a time.

Shapes: O outputs, I inputs, N tokens; T tiles of outputs, U tiles of inputs; W windows of the text.
"""
