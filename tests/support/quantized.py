"""Quantized checkpoints as their makers publish them, of tiny models: written by hand here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK = 128


def fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek's and Qwen's layout: FP8 values, and the scale of each block of 128 by 128."""
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    scale = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row, column in itertools.product(range(rows), range(columns)):
        place = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
        block = weight[place].float()
        scale[row, column] = block.abs().max() / 448
        values[place] = (block / scale[row, column]).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scale}


def fp8_channels(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' layout of FP8: the scale of each row, in bf16."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    return {"weight": (weight.float() / scale.float()).to(torch.float8_e4m3fn),
            "weight_scale": scale}


def int4_groups(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' packed layout: 8 codes of 4 bits in an int32, scales of 64 columns."""
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, columns // 64, 64)
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).reshape(rows, -1, 8).long() + 8
    packed = (codes << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return {"weight_packed": packed, "weight_scale": scale,
            "weight_shape": torch.tensor([rows, columns])}


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' layout of NVFP4: two codes a byte, the FP8 scale of each 16 columns, and
    one scale, which divides those, of all of them."""
    groups = weight.float().reshape(weight.shape[0], -1, 16)
    second = 448 * 6 / weight.float().abs().max().reshape(1)
    scale = (groups.abs().amax(-1) / 6 * second).to(torch.float8_e4m3fn)
    codes = fp4_codes(groups / (scale.float() / second)[..., None]).reshape(weight.shape)
    return {"weight_packed": codes[:, 0::2] + 16 * codes[:, 1::2], "weight_scale": scale,
            "weight_global_scale": second}


def fp4_codes(values: Tensor) -> Tensor:
    """The codes of the nearest FP4 values, of which 8 is the sign."""
    nearest = (values.abs()[..., None] - FP4_VALUES).abs().argmin(-1)
    return (nearest + 8 * (values < 0)).to(torch.uint8)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """gpt-oss' layout of experts [E, in, out]: blocks [E, out, in / 32, 16] of two codes a byte,
    and exponents [E, out, in / 32] with a bias of 127."""
    groups = weight.float().transpose(1, 2).reshape(*weight.transpose(1, 2).shape[:2], -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2**-20) / 6)) + 1
    codes = fp4_codes(groups / 2**exponent[..., None])
    return codes[..., 0::2] + 16 * codes[..., 1::2], (exponent + 127).to(torch.uint8)


COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed",
              "ignore": ["lm_head"]}
# By the name of a layout: how a matrix is stored, and the config's section.
LAYOUTS = {
    "fp8": (fp8_blocks, {"quant_method": "fp8", "activation_scheme": "dynamic",
                         "weight_block_size": [BLOCK, BLOCK]}),
    "compressed fp8": (fp8_channels, {**COMPRESSED, "format": "float-quantized", "config_groups": {
        "all": {"targets": ["Linear"], "weights": {
            "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True,
            "dynamic": False}}}}),
    "compressed int4": (int4_groups, {**COMPRESSED, "format": "pack-quantized", "config_groups": {
        "all": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 64,
            "symmetric": True, "dynamic": False}}}}),
    "compressed nvfp4": (nvfp4, {**COMPRESSED, "format": "nvfp4-pack-quantized", "config_groups": {
        "all": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "symmetric": True, "dynamic": False}}}}),
    "mxfp4": (None, {"quant_method": "mxfp4", "modules_to_not_convert": []}),
}


def quantize(folder: Path, out: Path, layout: str, per_file: int = 10**6) -> Path:
    """Write a quantized copy of the bf16 folder; per_file: the most tensors in a file."""
    store, section = LAYOUTS[layout]
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if layout == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = mxfp4(tensor)
        elif store is not None and "proj" in name and tensor.dim() == 2:
            module = name.removesuffix("weight")
            stored |= {f"{module}{part}": value for part, value in store(tensor).items()}
        else:
            stored[name] = tensor
    out.mkdir()
    names, weight_map = sorted(stored), {}
    for start in range(0, len(names), per_file):
        file = f"model-{start:05}.safetensors" if per_file < len(names) else "model.safetensors"
        own = names[start:start + per_file]
        save_file({name: stored[name].contiguous() for name in own}, out / file,
                  metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    if per_file < len(names):
        (out / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    for entry in folder.iterdir():
        if entry.suffix != ".safetensors" and entry.name != "config.json":
            (out / entry.name).write_bytes(entry.read_bytes())
    return out
