#!/usr/bin/env bash
# In channels last, the number of threads changes what batch normalisation returns.
#
# Expected: the number of threads changes sums over the batch (weight gradients, the loss), and
# never a forward pass through convolution or batch normalisation.
#
# Seen: the loss does not change, a convolution's weight gradient does, and batch normalisation in
# training mode does in channels last already going forward; in NCHW it does not. So a training run
# differs from its first forward pass on. The same in torch 2.11.0, 2.12.1, 2.14.1 and 2.15.0.
# Evaluation is equal.
#
# Why it matters: channels last is the faster layout for segmentation on CPUs. "The same seed gives
# the same weights" needs "with the same number of threads" beside it; evaluation of the same
# weights does not.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   Equal bit for bit with one and two threads?
#                            NCHW           channels last
#   convolution              yes            yes
#   its weight gradient      no             no
#   batch norm, training     yes            no
#   its running variance     yes            no
#   its weight gradient      yes            no
#   batch norm, evaluation   yes            yes
#   cross-entropy, mean      yes            yes
#   bilinear resize          yes            yes
#   cell means               yes            yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn
import torch.nn.functional as F


def results(threads, memory_format):
    """What a step computes, name -> tensor."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(8, 32, 64, 64).contiguous(memory_format=memory_format)
    convolution = nn.Conv2d(32, 32, 3, padding=1, bias=False).to(memory_format=memory_format)
    output = convolution(x)
    output.square().sum().backward()
    found = {"convolution": output, "its weight gradient": convolution.weight.grad}
    norm = nn.BatchNorm2d(32)
    output = norm(x)
    output.square().sum().backward()
    found["batch norm, training"] = output
    found["its running variance"] = norm.running_var
    found["its weight gradient "] = norm.weight.grad
    found["batch norm, evaluation"] = nn.BatchNorm2d(32).eval()(x)
    logits = x[:, :25].contiguous(memory_format=memory_format)
    labels = torch.randint(0, 25, (8, 64, 64))
    found["cross-entropy, mean"] = F.cross_entropy(logits, labels)
    found["bilinear resize"] = F.interpolate(x, scale_factor=2, mode="bilinear")
    found["cell means"] = F.adaptive_avg_pool2d(x, 6)
    return {name: tensor.detach() for name, tensor in found.items()}


equal = {}
for memory_format in (torch.contiguous_format, torch.channels_last):
    name = "NCHW" if memory_format == torch.contiguous_format else "channels last"
    one, two = results(1, memory_format), results(2, memory_format)
    equal[name] = {key: torch.equal(one[key], two[key]) for key in one}
print("Equal bit for bit with one and two threads?")
print(f"{'':24} {'NCHW':14} channels last")
for key in equal["NCHW"]:
    words = ["yes" if equal[name][key] else "no" for name in equal]
    print(f"{key:24} {words[0]:14} {words[1]}")
different = {name: [key for key, value in equal[name].items() if not value] for name in equal}
if not equal["NCHW"]["batch norm, training"]:
    sys.exit("changed: batch normalisation in NCHW depends on the threads")
if equal["channels last"]["batch norm, training"]:
    sys.exit("changed: batch normalisation in channels last does not depend on the threads")
if not equal["channels last"]["convolution"] or not equal["channels last"]["cross-entropy, mean"]:
    sys.exit("changed: a convolution or the cross-entropy depends on the threads")
PYTHON
