#!/usr/bin/env bash
# With fused=True, what runs inside an optimiser's step sees gradients 65,536 times too large.
#
# Expected, as GradScaler.step's documentation has it: it divides the gradients by its scale before
# the optimiser's step, and leaves a step with infinite gradients out. So a step hook, or a step()
# of one's own that ends in super().step(), gets true and finite gradients. fused=True only makes
# the arithmetic faster.
#
# Seen: the scaler divides for the plain AdamW, SGD and Adagrad; to the fused ones it hands the
# scale, and their kernels divide. The weights end up the same. But a hook that is registered with
# register_step_pre_hook then sees the scaled gradients, and is called for the step with infinite
# ones too, which the plain optimiser never begins. scaler.unscale_(optimizer) before the step mends
# the first, not the second; a private attribute, _step_supports_amp_scaling = False, mends both.
#
# Why it matters: gradient norms in a log, clipping, centralisation or Muon's momentum in such a
# hook or subclass are wrong by the scale, which changes during the run, and one infinite step stays
# in a momentum for good. Nothing warns, and with bf16, which needs no scaler, nothing shows.
#
# Run on 28 November 2026 on an Intel Xeon with AVX-512 and its bf16 instructions, two cores, Linux,
# Python 3.11. The output:
#
#   AdamW   plain             the hook saw [3.0]             weight 0.899
#   AdamW   fused             the hook saw [196608.0, inf]   weight 0.899
#   AdamW   fused, unscale_   the hook saw [3.0, inf]        weight 0.899
#   AdamW   fused, private    the hook saw [3.0]             weight 0.899
#   SGD     plain             the hook saw [3.0]             weight 0.7
#   SGD     fused             the hook saw [196608.0, inf]   weight 0.7
#   SGD     fused, unscale_   the hook saw [3.0, inf]        weight 0.7
#   SGD     fused, private    the hook saw [3.0]             weight 0.7
#   Adagrad plain             the hook saw [3.0]             weight 0.9
#   Adagrad fused             the hook saw [196608.0, inf]   weight 0.9
#   Adagrad fused, unscale_   the hook saw [3.0, inf]        weight 0.9
#   Adagrad fused, private    the hook saw [3.0]             weight 0.9
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

SCALE = 65536.0  # GradScaler's first one


WAYS = "plain", "fused", "fused, unscale_", "fused, private"


def run(kind, way):
    """What a hook sees as the gradient of 3 * weight, in two steps, the second infinite."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = getattr(torch.optim, kind)([weight], lr=0.1, fused="fused" in way)
    if "private" in way:
        optimizer._step_supports_amp_scaling = False
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.item()))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for factor in 3.0, float("inf"):
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        if "unscale_" in way:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return seen, round(weight.item(), 4)


expected = [[3.0], [3 * SCALE, float("inf")], [3.0, float("inf")], [3.0]]
for kind in "AdamW", "SGD", "Adagrad":
    weights = set()
    for way, gradients in zip(WAYS, expected):
        seen, weight = run(kind, way)
        weights.add(weight)
        print(f"{kind:8}{way:17} the hook saw {str(seen):17} weight {weight}")
        if seen != gradients:
            sys.exit(f"changed: what a hook of {kind}, {way}, sees")
    if len(weights) > 1:
        sys.exit(f"changed: {kind} has other weights when fused")
PYTHON
