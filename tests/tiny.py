"""A tiny prepared folder for the tests: coloured bars whose class shows in their colour alone."""
import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["background", "hips", "leftUpLeg", "rightUpLeg", "spine", "leftLeg", "rightLeg", "spine1",
         "leftFoot", "rightFoot", "spine2", "leftToeBase", "rightToeBase", "neck", "leftShoulder",
         "rightShoulder", "head", "leftArm", "rightArm", "leftForeArm", "rightForeArm", "leftHand",
         "rightHand", "leftHandIndex1", "rightHandIndex1"]
GROUPS = {"background": [0], "head": [16], "torso": [1, 4, 7, 10], "upper legs": [2, 3],
          "lower legs": [5, 6], "neck": [13], "shoulders": [14, 15], "upper arms": [17, 18],
          "lower arms": [19, 20], "feet": [8, 9], "hands": [21, 22],
          "fingers": [23, 24], "toes": [11, 12]}
K = len(NAMES)
SOURCE = "tiny figures of the tests, stand-in, not SURREAL"


def mirror_ids(names):
    """The id that each name becomes when left and right change places."""
    swapped = [name.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")
               for name in names]
    return [names.index(name) for name in swapped]


def colours():
    """(K, 3) colours far apart: 25 points of a 3 x 3 x 3 grid; background is dark."""
    grid = [[r, g, b] for r in (40, 140, 240) for g in (40, 140, 240) for b in (40, 140, 240)]
    return grid[:K]


def write_label(path, label, palette):
    """Stores label (H, W) uint8 as a palette PNG of 256 entries."""
    image = Image.fromarray(label)
    image.putpalette([v for colour in palette for v in colour] + [0] * (768 - 3 * len(palette)))
    image.save(path)


def draw(rng, size, classes):
    """label (size, size) uint8, bars of random classes on background; 24 joints, some NaN."""
    label = np.zeros((size, size), np.uint8)
    joints = np.full((24, 2), np.nan, np.float32)
    for part in rng.permutation(np.arange(1, classes))[:12]:
        width, height = rng.integers(size // 8, size // 3, 2)
        x, y = rng.integers(0, size - width), rng.integers(0, size - height)
        label[y:y + height, x:x + width] = part
        joints[part - 1] = x + (width - 1) / 2, y + (height - 1) / 2
    return label, joints


def write_prepared(folder, frames=12, size=64, splits=("train", "val", "test"), frames_per_clip=3,
                   seed=0, joints=True, names=NAMES, groups=GROUPS):
    """Writes a prepared folder (DESIGN, section 2) of `frames` frames a split and returns its path.

    frames: a number, or a dict split -> number. Images are the labels' colours plus a little noise.
    """
    folder, rng = Path(folder), np.random.default_rng(seed)
    palette = colours()[:len(names)]
    pixels = np.zeros(len(names), np.int64)
    for split in splits:
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        stored, places = [], []
        for i in range(frames[split] if isinstance(frames, dict) else frames):
            frame = f"{split}_c{i // frames_per_clip + 1:04d}_{i % frames_per_clip + 1:03d}"
            label, joint = draw(rng, size, len(names))
            image = np.array(palette)[label] + rng.normal(0, 4, (size, size, 3))
            image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
            image.save(folder / split / "images" / f"{frame}.jpg", quality=95)
            write_label(folder / split / "labels" / f"{frame}.png", label, palette)
            stored.append(frame)
            places.append(joint)
            if split == "train":
                pixels += np.bincount(label.ravel(), minlength=len(names))
        if joints and stored:
            np.savez(folder / split / "joints.npz", frames=np.array(stored),
                     joints=np.stack(places))
    part_mirror = mirror_ids(names)
    classes = dict(names=list(names), palette=palette, mirror=part_mirror, groups=groups,
                   joint_mirror=[part - 1 for part in part_mirror[1:]] if joints else [],
                   pixels=pixels.tolist(), size=size, mean=[0.3] * 3, std=[0.25] * 3,
                   source=SOURCE, settings={})
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def write_checkpoint(path, model, kind, data, logit_weights=None, **settings):
    """A checkpoint of `model`, of the `kind` of evaluate.MODELS, as train.py would write it."""
    import torch
    classes = json.loads((Path(data) / "classes.json").read_text())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(model=kind, kwargs=settings.pop("kwargs"), weights=model.state_dict(),
                    optimizer={}, step=7, best_miou=0.5, classes=classes,
                    settings=dict(data=str(data), size=None) | settings,
                    logit_weights=logit_weights), path)
    return Path(path)
