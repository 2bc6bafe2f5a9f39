"""Losses at the supervised positions. Shapes: M supervised positions, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def self_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Forward KL of the student (all tokens) from the teacher (pruned view), eq. 6 of arXiv 2602.03815.

    `T^2 * sum_m KL(softmax(teacher_m / T) || softmax(student_m / T)) / num_items_in_batch`, in float32.

    Args:
        student_logits (`torch.Tensor` of shape `(M, V)`): with gradients.
        teacher_logits (`torch.Tensor` of shape `(M, V)`): taken without gradients.
        temperature (`float`): T.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): divisor; M where None.

    Raises:
        ValueError: the two differ in shape, so the two views do not supervise the same tokens.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`student_logits` {tuple(student_logits.shape)} and `teacher_logits` {tuple(teacher_logits.shape)} "
            "must agree in shape: the full and the pruned view supervise different tokens. "
            "Set the labels of visual tokens and of each row's first token to -100."
        )
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="sum") * temperature**2
    return divergence / divisor(num_items_in_batch, student_logits)


def supervised_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of `logits` `(M, V)` against `targets` `(M,)`, summed over M and divided as above.

    A batch without supervised positions (M = 0) gives a finite zero that still reaches the graph.
    """
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    return loss / divisor(num_items_in_batch, logits)


def divisor(num_items_in_batch: torch.Tensor | int | None, logits: torch.Tensor) -> torch.Tensor | int:
    """What the sums are divided by: the items of the whole accumulated batch where known, never zero."""
    if num_items_in_batch is None:
        return max(1, logits.shape[0])
    if isinstance(num_items_in_batch, torch.Tensor):
        return num_items_in_batch.to(logits.device).clamp(min=1)
    return max(1, num_items_in_batch)
