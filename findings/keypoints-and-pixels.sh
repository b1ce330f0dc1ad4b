#!/usr/bin/env bash
# torchvision rotates key points to a place one pixel beside the pixels that they belong to.
#
# Expected: torchvision, kornia and albumentationsx mirror a key point at x to W - 1 - x, so they
# count from pixel centres, rotate accordingly, and enlarge x to 2 x, half a pixel beside the
# centre.
#
# Seen: torchvision mirrors around (W - 1) / 2, the centre of the pixel grid, and rotates around W /
# 2, a corner: after a rotation by 180 degrees the key point is one pixel off in x and y, while two
# mirrorings, which move the picture the same way, leave it right. Its enlargement is half a pixel
# off. albumentationsx is right in all four. kornia is consistent too, but its Resize maps corner
# pixels to corner pixels (3 becomes 6.16, not 6.5), so pictures enlarged by it lie elsewhere than
# those of the other two.
#
# torchvision is used without its compiled operations here, which its transforms do not need.
#
# Why it matters: who trains segmentation together with joints teaches them a shift that depends on
# the augmentation.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   mirror      torchvision      pixels at [16.0, 5.0]     key point at [16.0, 5.0]
#   mirror      kornia           pixels at [16.0, 5.0]     key point at [16.0, 5.0]
#   mirror      albumentationsx  pixels at [16.0, 5.0]     key point at [16.0, 5.0]
#   rotate 90   torchvision      pixels at [5.0, 16.0]     key point at [5.0, 17.0]     off by 1.00
#   rotate 90   kornia           pixels at [5.0, 16.0]     key point at [5.0, 16.0]
#   rotate 90   albumentationsx  pixels at [5.0, 16.0]     key point at [5.0, 16.0]
#   rotate 180  torchvision      pixels at [16.0, 14.0]    key point at [17.0, 15.0]    off by 1.00
#   rotate 180  kornia           pixels at [16.0, 14.0]    key point at [16.0, 14.0]
#   rotate 180  albumentationsx  pixels at [16.0, 14.0]    key point at [16.0, 14.0]
#   enlarge x2  torchvision      pixels at [6.5, 10.5]     key point at [6.0, 10.0]     off by 0.50
#   enlarge x2  kornia           pixels at [6.18, 10.27]   key point at [6.16, 10.26]
#   enlarge x2  albumentationsx  pixels at [6.5, 10.5]     key point at [6.5, 10.5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    pillow==13.0.0 kornia==0.9.0 albumentationsx==2.5.1 opencv-python-headless==5.0.0.93
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import types

import numpy as np
import torch

# torchvision's wheel may belong to another build of torch (CUDA), and its compiled operations then
# do not load here. The transforms are plain Python and do not need them.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("not needed")
import albumentations
import kornia.augmentation
from torchvision import tv_tensors
from torchvision.transforms import v2

SIZE = 20
image = torch.zeros(1, SIZE, SIZE)
image[0, 4:7, 2:5] = 1  # nine pixels around x = 3, y = 5
point = torch.tensor([[3.0, 5.0]])


def centre(picture):
    """x, y of the bright pixels' centre: where the key point should be."""
    weights = np.asarray(picture, float).squeeze()
    y, x = np.mgrid[:weights.shape[0], :weights.shape[1]]
    return [round(float((axis * weights).sum() / weights.sum()), 2) for axis in (x, y)]


def by_torchvision(transform):
    points = tv_tensors.KeyPoints(point, canvas_size=(SIZE, SIZE))
    picture, moved = transform(tv_tensors.Image(image), points)
    return centre(picture), moved[0].tolist()


def by_kornia(transform):
    sequence = kornia.augmentation.AugmentationSequential(transform,
                                                          data_keys=["input", "keypoints"])
    picture, moved = sequence(image[None], point[None])
    return centre(picture), [round(value, 2) for value in moved.flatten().tolist()]


def by_albumentations(transform):
    parameters = albumentations.KeypointParams(coord_format="xy", remove_invisible=False)
    result = albumentations.Compose([transform], keypoint_params=parameters)(
        image=(image[0].numpy() * 255).astype(np.uint8), keypoints=point.numpy())
    return centre(result["image"]), np.round(result["keypoints"][0][:2], 2).tolist()


tv, kornia_, albu = v2, kornia.augmentation, albumentations
cases = {
    "mirror": (by_torchvision(tv.RandomHorizontalFlip(1.0)),
               by_kornia(kornia_.RandomHorizontalFlip(p=1.0)),
               by_albumentations(albu.HorizontalFlip(p=1))),
    "rotate 90": (by_torchvision(tv.RandomRotation((90, 90))),
                  by_kornia(kornia_.RandomRotation((90.0, 90.0), p=1.0)),
                  by_albumentations(albu.Rotate((90, 90), p=1))),
    "rotate 180": (by_torchvision(tv.RandomRotation((180, 180))),
                   by_kornia(kornia_.RandomRotation((180.0, 180.0), p=1.0)),
                   by_albumentations(albu.Rotate((180, 180), p=1))),
    "enlarge x2": (by_torchvision(tv.Resize((2 * SIZE, 2 * SIZE))),
                   by_kornia(kornia_.Resize((2 * SIZE, 2 * SIZE))),
                   by_albumentations(albu.Resize(2 * SIZE, 2 * SIZE, p=1))),
}
names = ("torchvision", "kornia", "albumentationsx")
off = set()
for case, results in cases.items():
    for name, (pixels, moved) in zip(names, results):
        distance = max(abs(a - b) for a, b in zip(pixels, moved))
        print(f"{case:11} {name:16} pixels at {str(pixels):15} key point at {str(moved):15}"
              f"{f' off by {distance:.2f}' if distance > 0.1 else ''}")
        if distance > 0.1:
            off.add((case, name))
if off != {("rotate 90", "torchvision"), ("rotate 180", "torchvision"),
           ("enlarge x2", "torchvision")}:
    sys.exit("changed: other key points leave their pixels")
PYTHON
