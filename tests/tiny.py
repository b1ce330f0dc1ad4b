"""Made-up data for the tests: coloured bars whose class shows in their colour alone."""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from prepare_surreal import GROUPS, MIRROR, NAMES, PALETTE


def draw(rng, size, classes):
    """label (size, size) uint8, bars of random classes on background; 24 joints, some NaN."""
    label = np.zeros((size, size), np.uint8)
    joints = np.full((24, 2), np.nan, np.float32)
    for part in rng.permutation(np.arange(1, classes))[:12]:
        width, height = rng.integers(size // 8, size // 3, 2)
        x = rng.integers(0, size - width)
        y = rng.integers(0, size - height)
        label[y:y + height, x:x + width] = part
        joints[part - 1] = x + (width - 1) / 2, y + (height - 1) / 2
    return label, joints


def write_frame(folder, frame, image, label):
    """Writes float image (size, size, 3) and label as folder/images/FRAME.jpg, labels/FRAME.png."""
    image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    image.save(folder / f"images/{frame}.jpg", quality=95)
    stored = Image.fromarray(label)
    stored.putpalette(np.ravel(PALETTE).tolist())
    stored.save(folder / f"labels/{frame}.png")


def write_prepared(folder, frames=12, size=64, splits=("train", "val", "test"), frames_per_clip=3,
                   seed=0, joints=True, names=NAMES, groups=GROUPS):
    """Writes a prepared folder of `frames` frames a split, as prepare_surreal.py writes it, and
    returns its path. Images are the labels' colours plus a little noise."""
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    K = len(names)
    palette = np.array(PALETTE[:K])
    pixels = np.zeros(K, np.int64)
    for split in splits:
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        known = {}
        for i in range(frames):
            clip, number = divmod(i, frames_per_clip)
            frame = f"{split}_c{clip + 1:04d}_{number + 1:03d}"
            label, known[frame] = draw(rng, size, K)
            noisy = palette[label] + rng.normal(0, 4, (size, size, 3))
            write_frame(folder / split, frame, noisy, label)
            if split == "train":
                pixels += np.bincount(label.ravel(), minlength=K)
        if joints:
            np.savez(folder / split / "joints.npz", frames=[*known], joints=[*known.values()])
    mirror = MIRROR if names == NAMES[:K] else list(range(25))      # of 24 joints, from 1 on
    classes = dict(
        names=list(names),
        palette=palette.tolist(),
        mirror=mirror[:K],
        groups={name: ids for name, ids in groups.items() if max(ids) < K},
        joint_mirror=[part - 1 for part in mirror[1:]] if joints else None,
        pixels=pixels.tolist(),
        size=size,
        mean=[0.3] * 3,
        std=[0.25] * 3,
        source="tiny figures of the tests, stand-in, not SURREAL",
        settings={"seed": seed},        # as prepare_surreal.py leaves them: the counts are its own
    )
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def write_checkpoint(path, model, kind, data, logit_weights=None, *, kwargs, **settings):
    """A checkpoint of `model`, of the `kind` of evaluate.MODELS, as train.py would write it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = json.loads((Path(data) / "classes.json").read_text())
    settings = dict(data=str(data), size=None) | settings
    torch.save(dict(model=kind, kwargs=kwargs, weights=model.state_dict(), optimizer={}, step=7,
                    best_miou=0.5, rows=[], logit_weights=logit_weights, classes=classes,
                    settings=settings), path)
    return path


def criterion(logits, labels, levels=None):
    """Mean cross-entropy over the labels that are not 255: a plain version of train.py's."""
    assert logits.dtype == torch.float32
    target = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")
    target = target[:, 0].long()
    if levels is not None:
        target = F.pad(levels, (0, 256 - len(levels)), value=255)[target]
    return F.cross_entropy(logits, target, ignore_index=255)
