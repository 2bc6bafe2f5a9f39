"""PEFT adapters: which kinds are refused, how checkpoints are loaded into them, and QLoRA's 4-bit weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import ADAPTER_CONFIG_NAME, is_bitsandbytes_available

from ..utils.validation import as_type, check_keys, check_range, check_tensors, checked, hints_of

# Adapters whose wrapper adds to the loss that the model returns, and the weight of what it adds.
OWN_LOSSES = {"ADALORA": "orth_reg_weight", "SHADOW": "auxiliary_loss_weight"}


@dataclass(frozen=True)
class Origin:
    """Where an adapter was read from.

    Args:
        name (`str`): a folder, or a Hub repo "user/name".
        revision, cache_dir: those of the repo. A token is not kept, because configs are copied and pickled.
    """

    name: str
    revision: str | None = None
    cache_dir: str | Path | None = None


def remember_origins() -> None:
    """Makes PEFT remember where it reads the config of an adapter, which it forgets: see [`origin_of`].

    PEFT's own `from_pretrained` and transformers' both read it by one method, which is wrapped here, as is that which
    merges adapters: see [`merged_origins`].
    """
    from peft.config import PeftConfigMixin
    from peft.tuners.tuners_utils import BaseTuner

    read = PeftConfigMixin.from_pretrained.__func__
    if hasattr(read, "__wrapped__"):  # wrapped before
        return

    @wraps(read)
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        config = read(cls, pretrained_model_name_or_path, subfolder, **kwargs)
        of_repo = {key: kwargs.get(key) for key in ("revision", "cache_dir")}
        name = str(pretrained_model_name_or_path)
        # Absolute, because the working directory may change.
        config._origin = Origin(os.path.abspath(name) if os.path.isdir(name) else name, **of_repo)
        return config

    merge = BaseTuner.merge_and_unload

    @wraps(merge)
    def merge_and_unload(self, *args, **kwargs):
        origins = [origin_of(config) for config in self.peft_config.values()]
        model = merge(self, *args, **kwargs)
        model._merged_origins = [*merged_origins(model), *filter(None, origins)]
        return model

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)
    BaseTuner.merge_and_unload = merge_and_unload


def origin_of(config) -> Origin | None:
    """Where the adapter of a PEFT config was read from; None if it is new, or was read ahead of `remember_origins`."""
    return getattr(config, "_origin", None)


def merged_origins(model: nn.Module) -> list[Origin]:
    """Where the adapters that were merged into a model were read from, as far as known."""
    return getattr(model, "_merged_origins", [])


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that a model with adapters uses."""
    active = model.active_adapters  # a method if transformers' `add_adapter` made them
    return list(active() if callable(active) else active)


def seems_trained(model: nn.Module, adapter: str, config) -> bool:
    """Whether a LoRA adapter that begins at zero is elsewhere."""
    begins_at_zero = getattr(config, "init_lora_weights", None) in (True, "gaussian")
    ends = (p for name, p in model.named_parameters() if f".lora_B.{adapter}." in name and p.device.type != "meta")
    return begins_at_zero and any(bool(p.any()) for p in ends)


def check_adapter(config) -> None:
    """Raises a `ValueError` for PEFT methods that put virtual tokens before the sequence, or add to the loss."""
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"`peft_config` ({type(config).__name__}) learns virtual tokens, which shift every position that DualSpeed "
            "prunes by. Use another adapter, such as LoraConfig."
        )
    weight = OWN_LOSSES.get(getattr(config, "peft_type", None))
    if weight is not None and getattr(config, weight, 0):
        raise ValueError(
            f"`peft_config` ({type(config).__name__}) adds a term of its own to the model's loss, in whose place "
            f"DualSpeed computes another one, so that the term would be lost. Set its {weight}=0, or use another "
            "adapter, such as LoraConfig."
        )


def load_adapters(model: nn.Module, folder: str | Path, beside: tuple[str, ...] = ()) -> bool:
    """Fills each adapter of `model` from a checkpoint, in place; False if either has none.

    Tensors whose names begin as one `beside` them are no adapter's, whatever PEFT makes of their ends.

    The Trainer's own loading (transformers 5.23) freezes all adapters but one, and the optimizer then loses an adapter
    used by the fast view only. It also skips adapters that transformers' `add_adapter` made.

    Raises:
        ValueError: the checkpoint lacks one of the model's adapters.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters or not list(Path(folder).glob("**/" + ADAPTER_CONFIG_NAME)):
        return False
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    for name in adapters:
        path = Path(folder) / ("" if name == "default" else name)
        if not (path / ADAPTER_CONFIG_NAME).is_file():
            raise ValueError(f"The checkpoint {str(folder)!r} holds no adapter {name!r}. Remove it from the model.")
        weights = load_peft_weights(str(path), device="cpu")
        if not isinstance(model, PeftModel):  # the file has the names of a PeftModel
            weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
        own = {key: value for key, value in model.state_dict().items() if not key.startswith(beside)}
        known = get_peft_model_state_dict(model, own, name, save_embedding_layers=False).keys()
        loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
        check_tensors(path, known - weights.keys(), loaded.unexpected_keys)
    return True


def unsaved(model: nn.Module, beside: tuple[str, ...] = ()) -> list[str]:
    """The trained parameters of a model with adapters that PEFT saves with none of them: those of layers that were
    unfrozen by hand. `beside` is that of [`load_adapters`]."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return []
    from peft import get_peft_model_state_dict

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(beside)}
    apart = {n: p for n, p in trained.items() if not any(f".{adapter}." in f"{n}." for adapter in adapters)}
    # Some have no adapter's name: biases, for one.
    state = model.state_dict(keep_vars=True) if apart else {}
    saved = [get_peft_model_state_dict(model, state, name, save_embedding_layers=False) for name in adapters if apart]
    known = {id(tensor) for tensors in saved for tensor in tensors.values()}
    return [name for name, parameter in apart.items() if id(parameter) not in known]


def lora_config(options: dict):
    """The `peft.LoraConfig` of a recipe's adapters.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an option is unknown, or of another type than PEFT takes.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("`lora` needs PEFT. Run `pip install hf-dualspeed[peft]`.") from error
    check_keys("lora", options, [field.name for field in fields(LoraConfig) if field.init])
    hints = hints_of(LoraConfig)
    for key, value in options.items():
        as_type(f"lora.{key}", value, hints.get(key, Any))
    for key in {"r", "lora_alpha"} & options.keys():
        check_range(f"lora.{key}", options[key], 1)
    if "lora_dropout" in options:
        check_range("lora.lora_dropout", options["lora_dropout"], 0, 1, right_open=True)
    return LoraConfig(**options)


@checked
def add_lora(model: nn.Module, options: dict):
    """Adds the LoRA adapters of a recipe to the model. A quantized base is prepared first."""
    config = lora_config(options)
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_quantized", False):
        # The training arguments decide on activation checkpointing.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, config)


def four_bit(dtype: str, lora: dict) -> dict:
    """Arguments of `from_pretrained` that load weights for QLoRA: 4-bit NormalFloat with double quantization.

    Args:
        dtype (`str`): compute dtype; "auto" means bfloat16.
        lora (`dict`): the recipe's adapters. Modules that they train as a whole cannot be quantized.
    """
    if not is_bitsandbytes_available():
        raise ImportError('`load_in_4bit` needs bitsandbytes. Run `pip install "hf-dualspeed[qlora]"`.')
    whole = [f".*{re.escape(name)}" for name in lora.get("modules_to_save") or ()]  # PEFT matches the name's end
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        # A list replaces transformers' default, which skips the head.
        llm_int8_skip_modules=["lm_head", *whole] if whole else None,
    )
    # Weights are quantized on the device of this process.
    return {"quantization_config": config, "device_map": {"": PartialState().device}}
