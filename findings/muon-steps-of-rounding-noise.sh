#!/usr/bin/env bash
# torch.optim.Muon: for a gradient of rank 1, 73 % of the step is rounding noise, in float64 too.
#
# Expected, as its documentation has it: the step is the gradient's momentum made orthogonal, U V'
# where it is U S V'. So it has the gradient's rank, and lies in the spaces that the gradient's rows
# and columns span. A float32 or float64 layer gets it as exactly as its dtype allows.
#
# Seen: the matrix is cast to bfloat16 first, whatever the parameter's dtype. Each of its numbers is
# then wrong by up to 1/512 of itself. Over all directions that is little, about 0.0001 in each; but
# the iteration is made to lift small singular values, up to 485 times in its five rounds. So the
# noise becomes steps in the hundreds of directions that the gradient does not have. The layer
# below, 512 x 512, learns from a batch of 1, 4, 16 and 64 rows, whose gradient has that rank. Of
# the squared length of its first step, 73, 36, 13 and 3 % lie outside the spaces that the gradient
# spans. The same iteration in float32 has less than 0.0001 %.
#
# Why it matters: small batches, heads of few classes and low-rank adapters have such gradients. The
# step is as long as it should be or longer, and the loss falls, so nothing shows; weights that the
# data say nothing about walk at random. A check of one's own Muon against torch's, on random
# matrices of full rank, does not see it either. Run the iteration in float32 where it is cheap.
#
# Run on 28 November 2026 on an AMD EPYC (Zen 3, AVX2), two cores, Linux, Python 3.11. The output:
#
#   batch of  1: outside the gradient's spaces 73% of a float32 layer's step, 73% of a float64 one's;
#                iteration in float32 0.0000%
#   batch of  4: outside the gradient's spaces 36% of a float32 layer's step, 35% of a float64 one's;
#                iteration in float32 0.0000%
#   batch of 16: outside the gradient's spaces 13% of a float32 layer's step, 12% of a float64 one's;
#                iteration in float32 0.0000%
#   batch of 64: outside the gradient's spaces 3% of a float32 layer's step, 3% of a float64 one's;
#                iteration in float32 0.0000%
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch


def outside(step, gradient, rank):
    """Share of the squared length of a step outside the spaces of the gradient's columns, rows."""
    left, _, right = torch.linalg.svd(gradient.double())
    left = left[:, :rank]
    right = right[:rank]
    step = step.double()
    inside = left.T @ step @ right.T
    return 1 - float(inside.square().sum() / step.square().sum())


def in_float32(gradient):
    """Five rounds of Muon's iteration."""
    x = gradient.float() / gradient.float().norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


for rank, expected in (1, 0.73), (4, 0.36), (16, 0.13), (64, 0.03):
    shares = []
    for dtype in torch.float32, torch.float64:
        torch.manual_seed(0)
        layer = torch.nn.Linear(512, 512, bias=False, dtype=dtype)
        layer(torch.randn(rank, 512, dtype=dtype)).square().sum().backward()
        before = layer.weight.detach().clone()
        muon = torch.optim.Muon(layer.parameters(), lr=1.0, weight_decay=0)
        muon.step()
        step = before - layer.weight.detach()
        shares.append(outside(step, layer.weight.grad, rank))
    exact = outside(in_float32(layer.weight.grad), layer.weight.grad, rank)
    print(f"batch of {rank:2}: outside the gradient's spaces {shares[0]:.0%} of a float32 layer's step, "
          f"{shares[1]:.0%} of a float64 one's;\n             iteration in float32 {exact:.4%}")
    if max(abs(share - expected) for share in shares) > 0.1 or exact > 1e-6:
        sys.exit("changed: the share of rounding noise")
PYTHON
