#!/usr/bin/env bash
# torch 2.13 can no longer trace max_unpool2d, and OpenVINO's converter with it.
#
# Expected: torch.jit.trace works as for every other operation; OpenVINO has no rule for unpooling
# and says so.
#
# Seen: since torch 2.13, torch.jit.trace of F.max_unpool2d raises a TypeError about a condition
# that is a tensor; 2.11.0 and 2.12.1 trace it, 2.14.1 and 2.15.0 do not. OpenVINO's convert_model
# traces a module that it is given, so it fails, although it knows the operation: through
# torch.export it converts, and the values agree. Tried by hand: pnnx (20261020, for ncnn) fails
# with the same words. torch.ops.aten.max_unpool2d can be traced.
#
# Why it matters: SegNet's decoder is made of max_unpool2d. The error names neither the operation
# nor a way out; give OpenVINO the exported program or ONNX.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   torch 2.13.0+cpu OpenVINO 2026.4.1
#   torch.jit.trace             TypeError: cond must be a bool, but got a Tensor. For ten
#   torch.jit.trace of aten     the same values
#   torch.export                the same values
#   OpenVINO from the module    RuntimeError: cond must be a bool, but got a Tensor. For ten
#   OpenVINO from torch.export  the same values
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==${TORCH:-2.13.0}" \
    numpy==2.4.6 packaging==26.4 openvino==2026.4.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import openvino
import torch
from torch import nn
import torch.nn.functional as F


class Network(nn.Module):
    def forward(self, x):
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled, indices, 2)


class Direct(nn.Module):
    """The same through the operation below torch.nn.functional, which needs the size."""

    def forward(self, x):
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return torch.ops.aten.max_unpool2d(pooled, indices, list(x.shape[-2:]))


images = torch.randn(1, 2, 8, 8)
expected = Network()(images)


def through_openvino(model, **options):
    compiled = openvino.Core().compile_model(openvino.convert_model(model, **options), "CPU",
                                             {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([images.numpy()])[0])


attempts = {
    "torch.jit.trace": lambda: torch.jit.trace(Network(), images)(images),
    "torch.jit.trace of aten": lambda: torch.jit.trace(Direct(), images)(images),
    "torch.export": lambda: torch.export.export(Network(), (images,)).module()(images),
    "OpenVINO from the module": lambda: through_openvino(Network(), example_input=images),
    "OpenVINO from torch.export": lambda: through_openvino(
        torch.export.export(Network(), (images,))),
}
print("torch", torch.__version__, "OpenVINO", openvino.__version__.split("-")[0])
works = {}
for name, attempt in attempts.items():
    try:
        works[name] = bool(torch.allclose(attempt(), expected))
        print(f"{name:27} {'the same values' if works[name] else 'other values'}")
    except Exception as error:  # each converter has its own
        works[name] = False
        lines = [line for line in str(error).splitlines() if "cond must" in line] or [str(error)]
        print(f"{name:27} {type(error).__name__}: {lines[0].splitlines()[0][:46]}")
if list(works.values()) != [False, True, True, False, True]:
    sys.exit("changed: other ways work")
PYTHON
