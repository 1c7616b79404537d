"""What is learnt: the text, and a teacher's distribution over what comes next (Hinton et al. 2015, "Distilling the Knowledge in a Neural
Network"; with a quantized student: Polino et al. 2018, "Model Compression via Distillation and Quantization").

Shapes: B windows, L tokens, V words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    """Means over tokens, in nats."""

    cross_entropy: Tensor
    """Of the text: its perplexity is e to this."""
    kl: Tensor
    """Of the student's distribution from the teacher's, sum of p_teacher (log p_teacher - log p_student); 0 without one."""

    def weighted(self, *, cross_entropy: float, kl: float) -> Tensor:
        """What is made small."""
        return cross_entropy * self.cross_entropy + kl * self.kl


def loss_of(logits_BLV: Tensor, teacher_BLV: Tensor | None, targets_BL: Tensor) -> Loss:
    """Of these predictions, computed in float32."""
    log_q = F.log_softmax(logits_BLV.flatten(0, 1).float(), -1)
    cross_entropy = F.nll_loss(log_q, targets_BL.flatten())
    if teacher_BLV is None:
        return Loss(cross_entropy, cross_entropy.new_zeros(()))
    log_p = F.log_softmax(teacher_BLV.flatten(0, 1).float(), -1)
    return Loss(cross_entropy, F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
