"""The mode isolator: a short learned prompt that marks the pruned view of an image (arXiv 2602.03815).

Shapes: l isolator tokens, D hidden.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ..utils.constants import ISOLATOR_WEIGHTS_NAME
from ..utils.devices import gathered
from ..utils.validation import check_range, checked
from ..utils.writing import write_file


class ModeIsolator(nn.Module):
    """`length` learned tokens before each image's kept tokens in fast mode.

    Args:
        length (`int`): number of tokens l.
        hidden_size (`int`): width D of the language model.
        std (`float`): scale of the initial values; the scale of the token embeddings keeps the prompt in their range.
    """

    @checked
    def __init__(self, length: int, hidden_size: int, std: float = 0.02):
        check_range("length", length, 0, off="Use 0 for no tokens.")
        check_range("hidden_size", hidden_size, 1)
        check_range("std", std, 0)
        super().__init__()
        self.length, self.hidden_size = length, hidden_size  # ZeRO-3 leaves the prompt no shape between passes
        self.prompt = nn.Parameter(torch.randn(length, hidden_size) * std)

    @classmethod
    @checked
    def for_model(cls, model: nn.Module, length: int) -> ModeIsolator:
        """An isolator of the model's width and trained dtype, at the scale of its token embeddings."""
        # Width D and scale of the token embeddings, (V, D).
        weight = model.get_input_embeddings().weight
        text = model.config.get_text_config()
        # Quantized weights hold codes: take the config's initial scale.
        with gathered([weight]):
            std = weight.detach().float().std().item() if weight.is_floating_point() else text.initializer_range
        return cls(length, text.hidden_size, std).to(weight.device, trained_dtype(model))

    def forward(self) -> torch.Tensor:
        """The prompt, `(l, D)`. Called as a module, because sharded training gathers parameters in module calls."""
        return self.prompt

    @checked
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `mode_isolator.safetensors`."""
        save_isolator(self.prompt, folder)

    @checked
    def load_pretrained(self, folder: str | Path) -> None:
        """Fills the prompt in place from `folder`.

        Raises:
            FileNotFoundError: the folder holds no isolator.
            ValueError: it holds one of another length or width.
        """
        path = Path(folder) / ISOLATOR_WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"No {ISOLATOR_WEIGHTS_NAME} in {str(folder)!r}: it was saved without a mode isolator."
            )
        prompt = load_prompt(path)
        if not prompt.isfinite().all():
            raise ValueError(f"{str(path)!r} holds an isolator with NaN or infinity. Name an earlier checkpoint.")
        if prompt.shape != (self.length, self.hidden_size):
            raise ValueError(
                f"`isolator_length` is {self.length} (width {self.hidden_size}), but {str(folder)!r} holds an "
                f"isolator of length {prompt.shape[0]} (width {prompt.shape[1]}). "
                f"Set isolator_length={prompt.shape[0]}, or start from a checkpoint without {ISOLATOR_WEIGHTS_NAME}."
            )
        with torch.no_grad():
            self.prompt.copy_(prompt)

    def extra_repr(self) -> str:
        return f"length={self.length}, hidden_size={self.hidden_size}"


def trained_dtype(model: nn.Module) -> torch.dtype:
    """The widest dtype of the trainable parameters; without any, that of the model.

    Adapters of a bfloat16 model are float32, because small updates round to nothing in bfloat16. The same holds for the
    prompt.
    """
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    return reduce(torch.promote_types, dtypes) if dtypes else model.dtype


def load_prompt(path: Path) -> torch.Tensor:
    """The prompt `(l, D)` in a file of [`save_isolator`]; a `ValueError` names a file that holds none."""
    try:
        prompt = load_file(path).get("prompt")
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}. Name an earlier checkpoint.") from None
    if prompt is None or prompt.ndim != 2 or not prompt.is_floating_point():
        raise ValueError(f"{str(path)!r} holds no isolator, `prompt` of two dimensions. Save the model again.")
    return prompt


def saved_length(folder: str | Path) -> int | None:
    """Length of the isolator in `folder`; None if there is none."""
    path = Path(folder) / ISOLATOR_WEIGHTS_NAME
    return load_prompt(path).shape[0] if path.is_file() else None


def save_isolator(prompt: torch.Tensor, folder: str | Path) -> None:
    """Writes a prompt `(l, D)` to `mode_isolator.safetensors` in `folder`."""
    data = save({"prompt": prompt.detach().cpu().contiguous()}, metadata={"format": "pt"})
    write_file(Path(folder) / ISOLATOR_WEIGHTS_NAME, data)
