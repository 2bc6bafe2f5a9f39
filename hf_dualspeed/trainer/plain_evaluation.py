"""Evaluation losses: the model's own loss on all tokens, without the pruner and the isolator."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.loss.loss_utils import ForCausalLMLoss

from ..models.interface import ModelInterface
from .dual_forward import EVALUATION


class PlainEvaluationMixin:
    """Evaluation as in `Trainer`, with two differences.

    If only the loss is requested, the head runs at supervised positions only, and gives the same loss. In several
    processes each batch counts alike, as in one; the Trainer weighs those of the same time by their tokens.
    """

    # Whether the trainer uses logits for more than the loss.
    reads_logits = False

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """[`~transformers.Trainer.prediction_step`]; predictions hold the logits of all positions."""
        given = model, inputs, prediction_loss_only, ignore_keys
        sliced = prediction_loss_only and not self.reads_logits and self.dual_forward.slices_logits
        if not sliced or not has_plain_loss(self.dual_forward.interface, inputs):
            return super().prediction_step(*given)
        with self.dual_forward.in_mode(EVALUATION):
            return super().prediction_step(*given)

    def plain_loss(self, model, inputs, return_outputs=False):
        """The mean over the supervised tokens of a batch; NaN without any, as in transformers."""
        evaluates = self.dual_forward.mode == EVALUATION
        if not evaluates and (self.label_smoother is None or "labels" not in inputs):
            return super().compute_loss(model, inputs, return_outputs)
        outputs = model(**inputs)
        # The trainer's own mean; the Trainer shifts smoothed labels only for models that it knows as causal.
        loss = outputs.loss if evaluates else self.label_smoother(outputs, inputs["labels"], shift_labels=True)
        return (loss, outputs) if return_outputs else loss


def has_plain_loss(interface: ModelInterface, inputs: Mapping) -> bool:
    """Whether the model's loss on a batch is exactly the mean cross-entropy of the labels shifted by one."""
    routed = any(getattr(c, "output_router_logits", False) for c in (interface.config, interface.text_config))
    asked = {"output_router_logits", "shift_labels", "num_items_in_batch", "logits_to_keep"} & inputs.keys()
    return (
        inputs.get("labels") is not None
        and not routed
        and not asked
        and interface.outer.loss_function is ForCausalLMLoss
    )
