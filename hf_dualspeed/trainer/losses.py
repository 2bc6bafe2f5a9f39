"""Losses at the supervised positions. Shapes: M supervised positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..utils.validation import check_range, checked

# Wide enough that the launch of kernels does not matter.
VOCABULARY_SLICE = 16384
# The most row slices, so that the host's work does not grow with M, and the numbers that a slice may hold without more
# of them: 16 MB in float32, less than what larger ones cost on a CPU, and more than a GPU needs to be busy.
ROW_SLICES = 16
SLICE = 2**22


@checked
def self_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    sliced: bool = True,
) -> torch.Tensor:
    """Forward KL of the student (all tokens) from the teacher (pruned view), eq. 6 of arXiv 2602.03815.

    `T^2 * sum_m KL(softmax(teacher_m / T) || softmax(student_m / T)) / num_items_in_batch`, in float32.

    Args:
        student_logits (`torch.Tensor` of shape `(M, V)`): with gradients.
        teacher_logits (`torch.Tensor` of shape `(M, V)`): taken without gradients.
        temperature (`float`): T.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): divisor; M if None.
        sliced (`bool`): compute over slices of the vocabulary, with less memory; otherwise by PyTorch's functions at
            once.

    Raises:
        ValueError: the shapes differ, so the two views do not supervise the same tokens.
    """
    check_range("temperature", temperature, 0, left_open=True, off="1.0 is usual.")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not logits.is_floating_point():
            raise ValueError(f"`{name}` must hold floating-point numbers, got {logits.dtype}.")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"`student_logits` {tuple(student_logits.shape)} and `teacher_logits` {tuple(teacher_logits.shape)} "
            "must agree in shape: the full and the pruned view supervise different tokens. "
            "Set the labels of visual tokens and of each row's first token to -100."
        )
    # Sum over M positions of KL between distributions over V.
    if sliced:
        divergence = ForwardKL.apply(student_logits, teacher_logits.detach(), temperature)
    else:
        logs = [F.log_softmax(t.float() / temperature, dim=-1) for t in (student_logits, teacher_logits.detach())]
        divergence = F.kl_div(*logs, log_target=True, reduction="sum") * temperature**2
    return divergence / divisor(num_items_in_batch, student_logits)


class ForwardKL(torch.autograd.Function):
    """`T^2 * sum_m KL(softmax(t_m / T) || softmax(s_m / T))` in float32, over slices of the vocabulary.

    Only slices are in float32. Nothing of size (M, V) is kept beside the logits, which both passes hold anyway, and the
    gradient `T * (softmax(s / T) - softmax(t / T))` is computed in the student's dtype.
    """

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        # log Z = logsumexp(logits / T) of each row, (M, 1).
        student_norm, teacher_norm = (log_normalizer(logits, temperature) for logits in (student, teacher))
        divergence = student.new_zeros((), dtype=torch.float32)
        # Per slice (M, v): log p_t = t / T - log Z_t, and p_t * (log p_t - log p_s), summed over rows and vocabulary.
        for s, t in slices(student, teacher):
            taught = t.float() / temperature - teacher_norm
            divergence += (taught.exp() * (taught - s.float() / temperature + student_norm)).sum()
        ctx.save_for_backward(student, teacher, student_norm, teacher_norm)
        ctx.temperature = temperature
        # T^2 keeps the size of gradients independent of T (Hinton et al., arXiv 1503.02531).
        return divergence * temperature**2

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        student, teacher, student_norm, teacher_norm = ctx.saved_tensors
        gradient, scale = torch.empty_like(student), upstream * ctx.temperature
        # Per slice (M, v), in place: (p_s - p_t) * upstream * T, where T = T^2 (loss) * 1/T (logits).
        for s, t, part in slices(student, teacher, gradient):
            learned = (s.float() / ctx.temperature - student_norm).exp_()
            part.copy_(learned.sub_((t.float() / ctx.temperature - teacher_norm).exp_()).mul_(scale))
        return gradient, None, None


def slices(*logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Slices `(M, v)` of the vocabulary of tensors `(M, V)`."""
    return zip(*(tensor.split(VOCABULARY_SLICE, dim=-1) for tensor in logits), strict=True)


def log_normalizer(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`logsumexp(logits / T)` of each row in float32, `(M, 1)`."""
    # logsumexp of each slice, (M, 1), then over the slices, (M, slices) -> (M, 1).
    parts = [(part.float() / temperature).logsumexp(-1, keepdim=True) for (part,) in slices(logits)]
    return torch.cat(parts, dim=-1).logsumexp(-1, keepdim=True)


def supervised_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    sliced: bool = True,
) -> torch.Tensor:
    """Cross-entropy of `logits` `(M, V)` against `targets` `(M,)`, summed over M and divided by [`divisor`].

    Computed in float32. A batch without supervised positions (M = 0) gives a finite zero that is still in the graph.
    """
    if sliced:
        loss = CrossEntropy.apply(logits, targets, label_smoothing)
    else:
        loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    whole = divisor(num_items_in_batch, logits)
    return loss if isinstance(whole, int) and whole == 1 else loss / whole


class CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy in float32, over slices of the rows.

    As in [`ForwardKL`], only slices are in float32, and nothing of size (M, V) is kept beside the logits.
    `F.cross_entropy` keeps its log-softmax and, for half precision, a float32 copy of the logits. Slices are rows, not
    vocabulary, because fused kernels take whole rows.

    Time of forward and backward on one CPU core for 16 row slices, `F.cross_entropy` at once, and vocabulary slices:
    55, 86 and 97 ms for M=512, V=32064 in float32; 0.2, 0.6 and 1.3 s for M=512, V=151936 in bfloat16.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        parts = row_slices(logits)
        # Per slice: rows (m, V) in float32 against targets (m,).
        losses = [
            F.cross_entropy(rows.float(), hits, reduction="sum", label_smoothing=label_smoothing)
            for rows, hits in zip(logits.chunk(parts), targets.chunk(parts), strict=True)
        ]
        ctx.save_for_backward(logits, targets)
        ctx.label_smoothing = label_smoothing
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        logits, targets = ctx.saved_tensors
        parts, smoothing, width = row_slices(logits), ctx.label_smoothing, logits.shape[-1]
        # Gradient: softmax - smoothing / V everywhere, - (1 - smoothing) at the target, (M, 1).
        places = targets[:, None]
        hits = upstream.new_full(places.shape, smoothing - 1)

        def gradient_of(rows: torch.Tensor, places: torch.Tensor, hit: torch.Tensor) -> torch.Tensor:
            # Per slice (m, V): softmax, the target's term, the smoothed term, times the upstream gradient.
            softmax = rows.softmax(-1, dtype=torch.float32).scatter_add_(-1, places, hit)
            return (softmax.sub_(smoothing / width) if smoothing else softmax).mul_(upstream)

        if parts == 1:
            return gradient_of(logits, places, hits).to(logits.dtype), None, None
        gradient = torch.empty_like(logits)
        for *slice, part in zip(*(t.chunk(parts) for t in (logits, places, hits, gradient)), strict=True):
            part.copy_(gradient_of(*slice))
        return gradient, None, None


def row_slices(logits: torch.Tensor) -> int:
    """Into how many slices of rows the logits `(M, V)` are cut."""
    return min(ROW_SLICES, max(1, -(-logits.numel() // SLICE)))


def divisor(num_items_in_batch: torch.Tensor | int | None, logits: torch.Tensor) -> torch.Tensor | int:
    """The divisor of the sums: the items of the whole accumulated batch if known, never zero."""
    if num_items_in_batch is None:
        return max(1, logits.shape[0])
    if isinstance(num_items_in_batch, torch.Tensor):
        return num_items_in_batch.to(logits.device).clamp(min=1)
    return max(1, num_items_in_batch)
