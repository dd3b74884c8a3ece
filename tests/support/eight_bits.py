"""A rank whose weights travel in 8 bits: DeepSpeed's CUDA kernels for it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from support.counting_rank import counting_rank


class Quantizer:
    """What DeepSpeed's compiled module `quantizer` has, for symmetric groups of 8 bits."""

    Symmetric = "symmetric"

    @staticmethod
    def quantize(values: Tensor, groups: int, bits: int, kind: str) -> tuple[Tensor, Tensor]:
        """(int8 of the shape of `values`, fp32 (groups,): what a step of each group is worth).

        The kernels' second is (groups, 1), which NCCL gathers into a row and gloo does not.
        """
        # The kernels take whatever they get for fp16.
        assert (values.dtype, bits, kind) == (torch.half, 8, Quantizer.Symmetric)
        assert values.numel() % (8 * groups) == 0
        rows = values.float().view(groups, -1)
        step = rows.abs().amax(dim=1, keepdim=True) * 2 / 2**bits
        step[step == 0] = 1
        rounded = (rows / step).round().clamp(-128, 127).to(torch.int8)
        return rounded.view(values.shape), step.flatten()

    @staticmethod
    def dequantize(values: Tensor, steps: Tensor, groups: int, bits: int, kind: str) -> Tensor:
        """fp16 of the shape of `values`."""
        assert (values.dtype, bits, kind) == (torch.int8, 8, Quantizer.Symmetric)
        assert groups == steps.numel() and values.numel() % groups == 0
        return (values.float().view(groups, -1) * steps.view(-1, 1)).half().view(values.shape)


def quantizing_rank(argv: list[str], variables: dict[str, str], log: str) -> None:
    """Run as a counting rank that may quantize weights on a CPU."""
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    from amid_ds.engine import build

    CUDAQuantizer.quantizer_cuda_module = Quantizer
    build.require_quantizer = lambda world: None
    counting_rank(argv, variables, log)
