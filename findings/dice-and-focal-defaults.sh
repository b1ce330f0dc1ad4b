#!/usr/bin/env bash
# Dice losses of two libraries differ by 0.17 on the same logits, and both focal losses are too
# small by the number of classes.
#
# Expected: kornia's and MONAI's Dice losses agree within 0.01 at their default settings, and a
# focal loss with reduction "mean" is the mean over the pixels, as cross-entropy's is.
#
# Seen: four Dice losses from 0.43 to 0.60. They differ in what is averaged (classes or all pixels
# together, images or the batch), and the rest was not traced. Both focal losses average over pixels
# and classes, so they are 1/K of the formula's: with 25 classes, the learning rate of SGD would have
# to be 25 times as large. kornia's mean with ignore_index divides by the ignored pixels as well, so a
# picture of which half is ignored has half the loss.
#
# Why it matters: who replaces cross-entropy on people's parts by another loss changes the step size
# with it, without a word.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   kornia dice_loss          0.473
#   kornia dice_loss, macro   0.427
#   MONAI DiceLoss            0.601
#   MONAI DiceLoss, batch     0.565
#   focal loss, mean over the pixels: 0.6462; kornia 0.1292, MONAI 0.1292
#   the formula is 5.00 and 5.00 times as large
#   kornia, upper half ignored: 0.0648; the lower half alone: 0.1296
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    kornia==0.9.0 monai==1.6.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import kornia.losses
import monai.losses
import torch
import torch.nn.functional as F

torch.manual_seed(0)
classes = 5
labels = torch.randint(0, 4, (4, 32, 32))      # class 4 occurs nowhere
labels[:2][labels[:2] == 3] = 0                # class 3 occurs in two of four images
clear = torch.rand(4, 1, 32, 32) > 0.4
one_hot = F.one_hot(labels, classes).permute(0, 3, 1, 2)
logits = torch.randn(4, classes, 32, 32) + 3 * clear * one_hot
one_channel = labels[:, None]
values = {
    "kornia dice_loss": kornia.losses.dice_loss(logits, labels),
    "kornia dice_loss, macro": kornia.losses.dice_loss(logits, labels, average="macro"),
    "MONAI DiceLoss": monai.losses.DiceLoss(softmax=True, to_onehot_y=True)(logits, one_channel),
    "MONAI DiceLoss, batch": monai.losses.DiceLoss(softmax=True, to_onehot_y=True, batch=True)(
        logits, one_channel),
}
for name, value in values.items():
    print(f"{name:25} {value:.3f}")
spread = (max(values.values()) - min(values.values())).item()

log_p = F.log_softmax(logits, 1).gather(1, one_channel)[:, 0]
focal = (-(1 - log_p.exp()) ** 2 * log_p).mean().item()
options = dict(alpha=None, gamma=2.0, reduction="mean")
by_kornia = kornia.losses.focal_loss(logits, labels, **options).item()
by_monai = monai.losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)(
    logits, one_channel).item()
print(f"focal loss, mean over the pixels: {focal:.4f};"
      f" kornia {by_kornia:.4f}, MONAI {by_monai:.4f}")
print(f"the formula is {focal / by_kornia:.2f} and {focal / by_monai:.2f} times as large")

ignored = labels.clone()
ignored[:, :16] = 255
half = kornia.losses.focal_loss(logits, ignored, ignore_index=255, **options).item()
cut = kornia.losses.focal_loss(logits[:, :, 16:], labels[:, 16:], **options).item()
print(f"kornia, upper half ignored: {half:.4f}; the lower half alone: {cut:.4f}")

same = (spread > 0.15 and abs(focal / by_kornia - classes) < 1e-3
        and abs(focal / by_monai - classes) < 1e-3 and half < 0.9 * cut)
if not same:
    sys.exit("changed: other values")
PYTHON
