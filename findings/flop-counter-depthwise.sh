#!/usr/bin/env bash
# FlopCounterMode counts the backward pass of a depthwise convolution 65 times its forward pass.
#
# Expected: the backward pass of any convolution is counted as two times its forward pass.
#
# Seen: so it is without groups. With G groups the weight gradient is counted G times too high, as
# if there were no groups: 5 times forward in all with 4 groups, 65 times with 64. The forward count
# is right. The same in torch 2.11.0, 2.12.1, 2.14.1 and 2.15.0.
#
# Why it matters: training costs of a network with depthwise convolutions, the usual small network
# for segmentation, come out 20 times and more too high beside those of ICNet or SegNet.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   torch 2.13.0+cpu
#    1 groups: forward 75,497,472 (by hand 75,497,472), backward 150,994,944, 2 times forward
#    4 groups: forward 18,874,368 (by hand 18,874,368), backward  94,371,840, 5 times forward
#   64 groups: forward  1,179,648 (by hand  1,179,648), backward  76,677,120, 65 times forward
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==${TORCH:-2.13.0}" \
    numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CHANNELS, SIZE = 64, 32
images = torch.randn(1, CHANNELS, SIZE, SIZE, requires_grad=True)
print("torch", torch.__version__)
ratios = []
for groups in (1, 4, CHANNELS):
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=False)
    with FlopCounterMode(display=False) as forward:
        output = convolution(images)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    by_hand = 2 * 9 * CHANNELS * (CHANNELS // groups) * SIZE ** 2
    ratio = backward.get_total_flops() / forward.get_total_flops()
    ratios.append(ratio)
    print(f"{groups:2} groups: forward {forward.get_total_flops():>10,} (by hand {by_hand:>10,}),"
          f" backward {backward.get_total_flops():>11,}, {ratio:.0f} times forward")
if ratios != [2, 5, 65]:
    sys.exit("changed: another count")
PYTHON
