#!/usr/bin/env bash
# kmeans2 leaves clusters without any pose where poses repeat, and its three starts fail
# differently.
#
# Expected: with more clusters than distinct poses, SciPy's kmeans2 raises an error with minit="++",
# since the probabilities of the next centre become 0 / 0.
#
# Seen: it warns about an invalid division, goes on, and returns centres of which three are copies
# that no pose belongs to. With minit="points" it finds only four of five poses (the fifth is 37.5
# away from its centre) and warns that a cluster is empty; with minit="random" it raises a
# LinAlgError about a matrix. scikit-learn warns with the number of distinct points.
#
# Why it matters: clips of people who stand still repeat their poses. Who takes the same number of
# frames from every cluster gets fewer frames than were asked for, unless empty clusters are
# expected.
#
# Run on 28 November 2026 on AMD EPYC (family 26) with AVX-512 and its bf16 instructions,
# two cores, Linux, Python 3.11. The output:
#
#   SciPy, 5 clusters, minit=++       5 used, 5 different centres, worst 0.0
#   SciPy, 5 clusters, minit=points   4 used, 4 different centres, worst 37.5
#     warns: One of the clusters is empty. Re-run kme
#   SciPy, 5 clusters, minit=random   LinAlgError: Matrix is not positive definite
#   scikit-learn, 5 clusters: 5 used
#   SciPy, 8 clusters, minit=++       5 used, 5 different centres, worst 0.0
#     warns: invalid value encountered in divide
#   SciPy, 8 clusters, minit=points   5 used, 5 different centres, worst 0.0
#     warns: One of the clusters is empty. Re-run kme
#   SciPy, 8 clusters, minit=random   LinAlgError: Matrix is not positive definite
#   scikit-learn, 8 clusters: 5 used
#     warns: Number of distinct clusters (5) found sm
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 scipy==1.17.1 \
    scikit-learn==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import numpy as np
from scipy.cluster.vq import kmeans2
from sklearn.cluster import KMeans

random = np.random.default_rng(0)
distinct = random.normal(size=(5, 72))                 # five poses of 24 joints
poses = distinct[random.integers(0, 5, 1000)]          # a person who stands still in each
found = {}
for clusters in (5, 8):
    for start in ("++", "points", "random"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                centres, labels = kmeans2(poses, clusters, minit=start, seed=1)
                distance = ((poses - centres[labels]) ** 2).sum(1).max()
                used, same = len(set(labels)), len(np.unique(centres.round(6), axis=0))
                found[start, clusters] = (used, same)
                words = f"{used} used, {same} different centres, worst {distance:.1f}"
            except Exception as error:
                found[start, clusters] = type(error).__name__
                words = f"{type(error).__name__}: {error}"
        first = f"\n  warns: {str(caught[0].message)[:40]}" if caught else ""
        print(f"SciPy, {clusters} clusters, minit={start:8} {words}{first}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = KMeans(clusters, n_init=1, random_state=1).fit(poses)
    found["sklearn", clusters] = len(set(model.labels_))
    first = f"\n  warns: {str(caught[0].message)[:40]}" if caught else ""
    print(f"scikit-learn, {clusters} clusters: {len(set(model.labels_))} used{first}")
expected = {("++", 5): (5, 5), ("++", 8): (5, 5), ("points", 5): (4, 4), ("points", 8): (5, 5),
            ("random", 5): "LinAlgError", ("random", 8): "LinAlgError",
            ("sklearn", 5): 5, ("sklearn", 8): 5}
if found != expected:
    sys.exit("changed: other clusters")
PYTHON
