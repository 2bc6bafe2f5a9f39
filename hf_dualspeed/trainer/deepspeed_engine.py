"""Training under DeepSpeed, whose engine steps inside backward and shards what the optimizer updates (ZeRO)."""

from __future__ import annotations

from ..models.components import language_parts
from ..models.interface import modalities_in
from .checkpoints import check_isolator

# Optimizers that change what belongs to a parameter outside of `step`, or by what all parameters have in common.
OTHER_OPTIMIZERS = ("muon", "onebitadam", "onebitlamb", "zerooneadam")


class DeepSpeedMixin:
    """Keeps the parameters of one mode as they are in steps of the other, and ZeRO-3 from mixing steps up."""

    _needs_images = False  # in each micro-batch

    def check_deepspeed(self) -> None:
        """Raises a `ValueError` if DeepSpeed's settings would move parameters of one mode in steps of the other."""
        own = sorted(name for names in self.mode_parameters.names.values() for name in names)
        if not (self.is_deepspeed_enabled and own):
            return
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        zero, kind = settings.get("zero_optimization", {}), settings.get("optimizer", {}).get("type", "")
        refused = {
            "zero_optimization.zenflow": zero.get("zenflow"),
            "zero_optimization.offload_optimizer.super_offload": offload(zero).get("super_offload"),
            f"optimizer.type={kind!r}": kind.lower() in OTHER_OPTIMIZERS,
        }
        for name, given in refused.items():
            if given:
                raise ValueError(
                    f"DeepSpeed's `{name}` updates parameters elsewhere than in the optimizer's step, so those of one "
                    f"mode, such as {own[0]}, would move in steps of the other. Leave it out, or train without them: "
                    "isolator_length=0, a pruner that is not learned, no fast_only_parameters or slow_only_parameters."
                )

    def _wrap_model(self, model, training=True, dataloader=None):
        # The Trainer has made the optimizer right before, by whatever `create_optimizer` there is.
        if training and self.is_deepspeed_enabled:
            self._split_groups(self.optimizer)
        return super()._wrap_model(model, training, dataloader)

    def _split_groups(self, optimizer) -> None:
        """Gives parameters of one mode groups of their own: they can be left out of a step, also as one flat tensor."""
        if hasattr(optimizer, "param_groups"):
            groups = optimizer.param_groups
        else:  # accelerate's stand-in for the optimizer of DeepSpeed's settings
            groups = optimizer.params
            if not isinstance(groups[0], dict):
                groups = optimizer.params = [{"params": groups}]
        if not all("modes" in group for group in groups):
            groups[:] = [part for group in groups for part in self.mode_parameters.split(group)]

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:
            check_isolator(resume_from_checkpoint, self.args.isolator_length)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            sharded = self.deepspeed.optimizer
            for optimizer in (getattr(sharded, "optimizer", sharded), getattr(sharded, "backup_optimizer", None)):
                if optimizer is not None:
                    self.mode_parameters.skip_groups(optimizer, lambda: self.dual_forward.mode)
            self.mode_parameters.zero_gradients(lambda: self.dual_forward.mode)
            self.dual_forward.enter_last(self.model)
            self._needs_images = self._loses_gradients()
            # Under ZeRO-3, transformers 5.23 also remembers renamings that it did not use, which saving would undo.
            model = self.dual_forward.interface.outer
            if getattr(model, "_weight_conversions", None) is not None:
                model._weight_conversions = [c for c in model._weight_conversions if c.was_used()]
        return prepared

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.is_deepspeed_enabled:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._needs_images and not modalities_in(inputs):
            raise ValueError(
                "A micro-batch has no images. ZeRO-3 with `offload_optimizer` then loses the gradients of the vision "
                "tower and the projector from the step's other micro-batches. Leave samples without images out, set "
                "gradient_accumulation_steps=1, freeze tower and projector, or use ZeRO-2."
            )
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            forget_gradients(self.deepspeed.optimizer)
        return loss

    def _loses_gradients(self) -> bool:
        """Whether gradients get lost where the last micro-batch of a step does not reach the vision tower."""
        zero = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        if zero.get("stage") != 3 or offload(zero).get("device", "none") == "none":
            return False
        outer = self.dual_forward.interface.outer
        apart = [*language_parts(outer), self.dual_forward]
        others = {id(p) for part in apart for p in part.parameters()}
        visual = any(p.requires_grad and id(p) not in others for p in outer.parameters())
        return visual and self.args.gradient_accumulation_steps > 1


def offload(zero: dict) -> dict:
    """How ZeRO's settings keep the optimizer's state elsewhere; empty if they do not."""
    return zero.get("offload_optimizer") or {}


def forget_gradients(optimizer) -> None:
    """Clears the gradients that ZeRO-3 keeps of a step: a parameter that the next one does not reach would get them."""
    kept = [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    if kept[0] is None:
        return
    if optimizer.offload_optimizer:
        optimizer.reset_cpu_buffers()  # the norms
        kept += [flat.grad for flat in optimizer.fp32_partitioned_groups_flat]
    for gradient in kept:
        if gradient is not None:
            gradient.zero_()
