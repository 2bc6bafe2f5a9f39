"""The language model's head and the cross-entropy in one, by Liger's fused kernel, without logits.

In a fused pass, the head returns the hidden states that it receives, and the model returns them in place of logits.
Shapes: M supervised positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn
from transformers import TrainingArguments

from ..models.interface import ModelInterface
from .losses import supervised_cross_entropy

logger = logging.getLogger(__name__)

# Devices that run Liger's Triton kernels.
DEVICES = ("cuda",)


class FusedHead:
    """A model's head, which [`FusedHead.open`] turns into the identity.

    The first pass runs as usual and shows whether the model's logits are exactly what the head returns: some models cap
    or scale them.

    Args:
        head (`nn.Linear`): the model's output embeddings.
        required (`bool`): raise an error if the first pass shows that fusing does not apply, instead of running as
            usual.
    """

    def __init__(self, head: nn.Linear, required: bool = False):
        self.head, self.required = head, required
        self.applies: bool | None = None  # unknown before the first pass
        self.fuses = False  # whether the last call returned hidden states
        self._returned: list[torch.Tensor] = []
        self._watch = None

    def open(self, wanted: bool = True) -> None:
        """Prepares the next call of the model.

        If `wanted`, it returns hidden states for logits. The first wanted call runs as usual and is watched.
        """
        self.close()
        self.fuses = wanted and bool(self.applies)
        if self.fuses:
            # (M, D) in, (M, D) out.
            self.head.forward = identity
        elif wanted and self.applies is None:
            # Keep a copy (M, V) of what the head returns, because the model may write into it.
            keep = lambda head, args, logits: self._returned.append(logits.detach().clone())  # noqa: E731
            self._watch = self.head.register_forward_hook(keep)

    def close(self) -> None:
        """Undoes `open`, also after a call that failed."""
        vars(self.head).pop("forward", None)
        if self._watch is not None:
            self._watch.remove()
        self._watch, self._returned = None, []

    def after(self, logits: torch.Tensor) -> None:
        """Closes, and compares the logits `(..., V)` of the first pass with the head's. Waits for the device in that
        pass.

        Raises:
            ValueError: fusing is `required` and does not apply.
        """
        watched, returned = self._watch is not None, self._returned
        self.close()
        if not watched or not logits.numel():
            return
        # Equal logits prove that the model leaves them as they are, except zeros, which capping and scaling keep.
        same = len(returned) == 1 and returned[0].shape == logits.shape and bool(returned[0].any())
        self.applies = same and torch.equal(returned[0], logits.detach().to(returned[0].dtype))
        if not self.applies:
            reason = "the model's logits are not what its head returns: it caps, scales or replaces them"
            if self.required:
                raise ValueError(not_applicable(reason))
            logger.info("No fused loss: %s.", reason)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The head's trainable parameters, which enter the graph with the loss, not with the pass."""
        return (p for p in self.head.parameters() if p.requires_grad)

    def cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Summed cross-entropy of the head's logits of `hidden` `(M, D)` against `targets` `(M,)`."""
        # Liger computes gradients in forward, only if the hidden states require them, and fails for M = 0.
        head_alone = torch.is_grad_enabled() and not hidden.requires_grad and any(True for _ in self.parameters())
        # Logits (M, V) in these cases; otherwise none.
        if head_alone or not len(hidden):
            return supervised_cross_entropy(self.head(hidden), targets, 1, label_smoothing)
        return fused_loss(hidden, self.head.weight, targets, self.head.bias, label_smoothing)


def identity(hidden: torch.Tensor) -> torch.Tensor:
    """The forward of an open head: the identity."""
    return hidden


def fused_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, label_smoothing: float
) -> torch.Tensor:
    """Liger's summed cross-entropy of `hidden @ weight.T + bias`, for `(M, D)`, `(V, D)` and targets `(M,)`.

    Waits for the device twice, to count the targets and in backward. Keeps the weight's gradient `(V, D)` from forward
    on.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias=bias, label_smoothing=label_smoothing, reduction="sum"
    )


def fused_head(
    interface: ModelInterface, choice: str, device: torch.device, otherwise: str | None = None
) -> FusedHead | None:
    """The model's head for passes with a fused loss; None if it is "off", or "auto" and does not apply.

    Args:
        interface (`ModelInterface`): of the model.
        choice (`str`): "auto", "on" or "off".
        device (`torch.device`): the device of training.
        otherwise (`str`, *optional*): why the caller cannot use it.

    Raises:
        ValueError: it is "on" and does not apply; the message says why.
    """
    if choice == "off":
        return None
    head = interface.outer.get_output_embeddings()
    reason = otherwise or why_not(head, device)
    if reason is None:
        return FusedHead(head, required=choice == "on")
    if choice == "on":
        raise ValueError(not_applicable(reason))
    return None


def why_not(head: nn.Module | None, device: torch.device) -> str | None:
    """Why a head cannot be fused with the loss, as far as known before the first pass; None if it can."""
    if (missing := without_liger(device)) is not None:
        return missing
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        return f"the model's head is {kind}, not a plain nn.Linear: adapted, quantized or its own"
    if type(head.weight) is not nn.Parameter:
        return f"the weight of the model's head is a {type(head.weight).__name__}: sharded or quantized"
    if "forward" in vars(head):
        return "the forward of the model's head has been replaced, as accelerate's device_map does"
    return None


def without_liger(device: torch.device) -> str | None:
    """Why Liger's kernels cannot run on a device; None if they can."""
    if find_spec("liger_kernel") is None:
        return 'liger-kernel is not installed (pip install "hf-dualspeed[liger]")'
    if device.type not in DEVICES:
        return f"its kernels run on {' and '.join(DEVICES)}, and the model is trained on {device.type}"
    return None


def without_ligers_layers(interface: ModelInterface, device: torch.device) -> str | None:
    """Why Liger has no norms, rotary embeddings and activations for a model on a device; None if it has.

    Liger itself takes a model that it does not know for one without anything to replace.
    """
    if (missing := without_liger(device)) is not None:
        return missing
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    kind, text = interface.config.model_type, interface.text_config.model_type
    if kind in KNOWN:
        return None
    remedy = f"; those of its language model ({text!r}) can be applied to model.get_decoder()" if text in KNOWN else ""
    return f"liger-kernel {version('liger-kernel')} has no kernels for models of type {kind!r}{remedy}"


def check_ligers_layers(args: TrainingArguments, interface: ModelInterface) -> None:
    """Raises a `ValueError` if `use_liger_kernel` is set and would replace nothing, or could not run."""
    reason = without_ligers_layers(interface, args.device) if args.use_liger_kernel else None
    if reason is not None:
        raise ValueError(f"`use_liger_kernel` is True, but {reason}. Set use_liger_kernel=False.")


def without_ligers_loss(args: TrainingArguments) -> None:
    """Leaves Liger's own loss out of what `use_liger_kernel` asks for: norms, rotary embeddings and activations.

    Raises:
        ValueError: the loss is asked for by name, which would replace the model's forward.
    """
    if not args.use_liger_kernel:
        return
    args.liger_kernel_config = {"fused_linear_cross_entropy": False, **(args.liger_kernel_config or {})}
    if args.liger_kernel_config["fused_linear_cross_entropy"]:
        raise ValueError(
            "`liger_kernel_config` has fused_linear_cross_entropy=True, which puts Liger's forward in place of the "
            "model's, which takes no mask of positions as `logits_to_keep`, on which every step rests. Leave it out, "
            "and set fused_head_loss='on' for its fused loss."
        )


def not_applicable(reason: str) -> str:
    """The error message for a fused loss that was required."""
    return f"`fused_head_loss` is 'on', but {reason}. Use 'auto', which takes it where it applies, or 'off'."
