#!/usr/bin/env bash
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
                words = f"{used} clusters used, {same} different centres, worst {distance:.1f}"
            except Exception as error:
                found[start, clusters] = type(error).__name__
                words = f"{type(error).__name__}: {error}"
        first = f"; warns: {str(caught[0].message)[:40]}" if caught else ""
        print(f"SciPy, {clusters} clusters, minit={start:8} {words}{first}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = KMeans(clusters, n_init=1, random_state=1).fit(poses)
    found["sklearn", clusters] = len(set(model.labels_))
    first = f"; warns: {str(caught[0].message)[:40]}" if caught else ""
    print(f"scikit-learn, {clusters} clusters: {len(set(model.labels_))} used{first}")
expected = {("++", 5): (5, 5), ("++", 8): (5, 5), ("points", 5): (4, 4), ("points", 8): (5, 5),
            ("random", 5): "LinAlgError", ("random", 8): "LinAlgError",
            ("sklearn", 5): 5, ("sklearn", 8): 5}
if found != expected:
    sys.exit("changed: other clusters")
PYTHON
