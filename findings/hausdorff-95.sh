#!/usr/bin/env bash
# The 95 % Hausdorff distance of one pair of masks is 7, 20 or 21 pixels, depending on the library.
#
# Expected: three libraries agree within half a pixel on the same two masks, since they agree on the
# maximum.
#
# Seen: they agree on the maximum (24 px) and not on the 95th percentile. The prediction has 16
# stray pixels far from the body. MONAI takes the percentile in each direction and then the larger
# one; surface-distance does so with borders weighted by their length; medpy puts the distances of
# both directions together before it takes the percentile, so that few stray pixels vanish among
# many good ones.
#
# Why it matters: predicted bodies have stray pixels. A table with "HD95" has to name the library.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#                     95th percentile   maximum
#   MONAI                    21.00 px   24.00 px
#   surface-distance         20.00 px   24.00 px
#   medpy                     7.00 px   24.00 px
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    scipy==1.17.1 monai==1.6.1 medpy==0.5.2 surface-distance==0.1
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import numpy as np
import surface_distance
import torch
from medpy.metric.binary import hd, hd95
from monai.metrics import compute_hausdorff_distance

y, x = np.mgrid[:128, :128]
truth = (y - 60) ** 2 / 40 ** 2 + (x - 60) ** 2 / 20 ** 2 < 1     # an upright body
prediction = (y - 63) ** 2 / 38 ** 2 + (x - 57) ** 2 / 24 ** 2 < 1
prediction[60:64, 100:104] = True                                 # and 16 stray pixels

tensors = [torch.tensor(mask)[None, None].float() for mask in (prediction, truth)]
distances = surface_distance.compute_surface_distances(truth, prediction, (1, 1))
results = {
    "MONAI": [compute_hausdorff_distance(*tensors, include_background=True, percentile=p).item()
              for p in (95, 100)],
    "surface-distance": [surface_distance.compute_robust_hausdorff(distances, p)
                         for p in (95, 100)],
    "medpy": [float(hd95(prediction, truth)), float(hd(prediction, truth))],
}
print(f"{'':17} 95th percentile   maximum")
for name, (robust, maximum) in results.items():
    print(f"{name:17} {robust:12.2f} px {maximum:7.2f} px")
if {name: [round(v, 2) for v in values] for name, values in results.items()} != {
        "MONAI": [21, 24], "surface-distance": [20, 24], "medpy": [7, 24]}:
    sys.exit("changed: other distances")
PYTHON
