"""Draws levels.png: what coarse-to-fine modules learn of a frame, and both kinds of joints.

    python .github/levels.py data/standin 201_01_c0004_001
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate                                             # noqa: E402
from hourglass import LEVELS, centroids, level_table        # noqa: E402

data, frame = sys.argv[1:]
classes = evaluate.read_classes(data)
split, palette = evaluate.Split(data, "train", classes), np.array(classes["palette"])
batch = split[[split.frames.index(frame)]]
photo, labels = batch["images"][0].permute(1, 2, 0).numpy(), batch["labels"][0].numpy()
pictures = [(photo, "photo")]
for level in LEVELS:
    table = level_table(level).numpy()                      # the coarser class of each id
    first = np.unique(table, return_index=True)[1]          # shown in the colour of its first id
    ids = first[table[labels.clip(max=24)]]
    ids[labels == evaluate.IGNORE] = evaluate.IGNORE
    pictures.append((evaluate.colours(ids, palette), f"{level}: {len(first)} classes"))
sheet = Figure((13.2, 2.4), dpi=100, layout="constrained")
grid = sheet.subplots(1, 6)
for axes, (picture, title) in zip(grid, [*pictures, (photo, "joints (dots), centroids (rings)")]):
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])
grid[-1].images[0].set_alpha(0.45)
for part, joint, centre in zip(range(1, 25), batch["joints"][0], centroids(batch["labels"], 25)[0]):
    grid[-1].plot(*joint, "o", color=palette[part] / 255, markersize=4)
    grid[-1].plot(*centre, "o", markerfacecolor="none", markeredgecolor=palette[part] / 255)
sheet.savefig(Path(__file__).with_suffix(".png"))
