#!/usr/bin/env bash
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
