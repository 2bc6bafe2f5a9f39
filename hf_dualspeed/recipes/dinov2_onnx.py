"""A DINOv2 backbone from an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model


def read_vision_tower(path: str | Path) -> Dinov2Model:
    """Reads the DINOv2 backbone of an ONNX file that torch exported. Other parts of the file are ignored.

    Raises:
        ValueError: the file is not ONNX, or holds no DINOv2 with an MLP (sizes S, B and L).
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        weights = dict(onnx_weights(onnx.load(str(path)).graph))
        config = _vision_config(weights)
    except DecodeError:
        raise _unreadable(path, "it is not an ONNX file") from None
    except KeyError as error:
        raise _unreadable(path, f"it has no weight {error}") from None
    # Only masked pretraining uses the mask token, and exports lack it.
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    # Not `load_state_dict`: `from_pretrained` maps published names to the present names of modules.
    tower, info = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    for what in ("missing", "unexpected"):
        if names := sorted(info[f"{what}_keys"]):
            raise _unreadable(path, f"{len(names)} weights are {what}, such as {names[0]}")
    tower.config._name_or_path = ""  # would be "None" in the checkpoint
    return tower.eval()


def _unreadable(path: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"`vision_onnx` is {str(path)!r}, from which no DINOv2 backbone can be read: {reason}. Pass a file that "
        "torch.onnx exported from transformers' Dinov2Model of size S, B or L."
    )


def onnx_weights(graph) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the backbone's weights in an `onnx.GraphProto`, by their published names.

    torch's exporter keeps the names of most parameters, with the outer modules' names as a prefix. It renames folded
    ones. The transposed weight of a linear layer is found by the bias that is added to its product. The positions of
    the class token `(1, 1, D)` and of the patches `(1, N, D)` are found by their shapes.
    """
    from onnx import numpy_helper

    arrays = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    cls = next((name for name in arrays if name.endswith("embeddings.cls_token")), None)
    if cls is None:
        raise KeyError("embeddings.cls_token")
    prefix = cls.removesuffix("embeddings.cls_token")
    named = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    folded = {name: array for name, array in arrays.items() if name.startswith("onnx::")}
    yield from ((name.removeprefix(prefix), array) for name, array in named.items())
    # A product (S, D') plus a known bias has the folded weight (D, D') of the bias's layer.
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        product = next((name for name in node.input if factors.get(name) in folded), None)
        bias = next((name for name in node.input if name in named and name.endswith(".bias")), None)
        if node.op_type == "Add" and product and bias:
            yield bias.removeprefix(prefix).removesuffix("bias") + "weight", folded[factors[product]].T.contiguous()
    width = arrays[cls].shape[-1]
    positions = [array for array in folded.values() if array.dim() == 3 and array.shape[::2] == (1, width)]
    # The class token's position comes first: (1, 1 + N, D).
    yield "embeddings.position_embeddings", torch.cat(sorted(positions, key=lambda array: array.shape[1]), dim=1)


def _vision_config(weights: dict[str, torch.Tensor]) -> Dinov2Config:
    patches = weights["embeddings.patch_embeddings.projection.weight"]
    positions = weights["embeddings.position_embeddings"].shape[1] - 1
    width, patch_size = patches.shape[0], patches.shape[-1]
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}),
        # Heads are 64 wide in all sizes of DINOv2.
        num_attention_heads=width // 64,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        image_size=round(positions**0.5) * patch_size,
        patch_size=patch_size,
    )
