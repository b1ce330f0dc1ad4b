"""Made-up data for the tests: coloured bars whose class shows in their colour alone."""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

NAMES = ["background", "hips", "leftUpLeg", "rightUpLeg", "spine", "leftLeg", "rightLeg", "spine1",
         "leftFoot", "rightFoot", "spine2", "leftToeBase", "rightToeBase", "neck", "leftShoulder",
         "rightShoulder", "head", "leftArm", "rightArm", "leftForeArm", "rightForeArm", "leftHand",
         "rightHand", "leftHandIndex1", "rightHandIndex1"]
GROUPS = {"background": [0], "head": [16], "torso": [1, 4, 7, 10], "upper legs": [2, 3],
          "lower legs": [5, 6], "neck": [13], "shoulders": [14, 15], "upper arms": [17, 18],
          "lower arms": [19, 20], "feet": [8, 9], "hands": [21, 22], "fingers": [23, 24],
          "toes": [11, 12]}     # columns of the paper's Tables 2 and 5


def mirror_ids(names):
    """The id that each name becomes when left and right change places."""
    swapped = [name.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")
               for name in names]
    return [names.index(name) for name in swapped]


def colours():
    """25 colours far apart: points of a 3 x 3 x 3 grid; the background's is dark."""
    return [[r, g, b] for r in (40, 140, 240) for g in (40, 140, 240) for b in (40, 140, 240)][:25]


def write_label(path, label, palette):
    """Stores label (H, W) uint8 as a palette PNG of 256 entries."""
    image = Image.fromarray(label)
    image.putpalette([v for colour in palette for v in colour] + [0] * (768 - 3 * len(palette)))
    image.save(path)


def draw(rng, size, classes):
    """label (size, size) uint8, bars of random classes on background; 24 joints, some NaN."""
    label, joints = np.zeros((size, size), np.uint8), np.full((24, 2), np.nan, np.float32)
    for part in rng.permutation(np.arange(1, classes))[:12]:
        width, height = rng.integers(size // 8, size // 3, 2)
        x, y = rng.integers(0, size - width), rng.integers(0, size - height)
        label[y:y + height, x:x + width] = part
        joints[part - 1] = x + (width - 1) / 2, y + (height - 1) / 2
    return label, joints


def write_prepared(folder, frames=12, size=64, splits=("train", "val", "test"), frames_per_clip=3,
                   seed=0, joints=True, names=NAMES, groups=GROUPS):
    """Writes a prepared folder (DESIGN, section 2) of `frames` frames a split and returns its path.
    Images are the labels' colours plus a little noise."""
    folder, rng, mirror = Path(folder), np.random.default_rng(seed), mirror_ids(names)
    palette, pixels = colours()[:len(names)], np.zeros(len(names), np.int64)
    for split in splits:
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        known = {}
        for i in range(frames):
            frame = f"{split}_c{i // frames_per_clip + 1:04d}_{i % frames_per_clip + 1:03d}"
            label, known[frame] = draw(rng, size, len(names))
            image = np.array(palette)[label] + rng.normal(0, 4, (size, size, 3))
            image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
            image.save(folder / split / "images" / f"{frame}.jpg", quality=95)
            write_label(folder / split / "labels" / f"{frame}.png", label, palette)
            if split == "train":
                pixels += np.bincount(label.ravel(), minlength=len(names))
        if joints:
            np.savez(folder / split / "joints.npz", frames=[*known], joints=[*known.values()])
    (folder / "classes.json").write_text(json.dumps(dict(
        names=list(names), palette=palette, mirror=mirror, groups=groups,
        joint_mirror=[part - 1 for part in mirror[1:]] if joints else None, pixels=pixels.tolist(),
        size=size, mean=[0.3] * 3, std=[0.25] * 3, settings={},
        source="tiny figures of the tests, stand-in, not SURREAL")))
    return folder


def write_checkpoint(path, model, kind, data, logit_weights=None, *, kwargs, **settings):
    """A checkpoint of `model`, of the `kind` of evaluate.MODELS, as train.py would write it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=kind, kwargs=kwargs, weights=model.state_dict(), optimizer={}, step=7,
                    best_miou=0.5, rows=[], logit_weights=logit_weights,
                    classes=json.loads((Path(data) / "classes.json").read_text()),
                    settings=dict(data=str(data), size=None) | settings), path)
    return Path(path)


def criterion(logits, labels, levels=None):
    """Mean cross-entropy over the labels that are not 255: a plain version of train.py's."""
    assert logits.dtype == torch.float32
    target = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")
    if levels is not None:
        target = F.pad(levels, (0, 256 - len(levels)), value=255)[target.long()]
    return F.cross_entropy(logits, target[:, 0].long(), ignore_index=255)
