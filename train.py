"""Train a network on a prepared folder: augmentation, class weights, losses, the loop, the ablation study.

The procedure is the one of "Fully Convolutional Architectures for Multi-Part Body Segmentation"
(Borrego Carazo, 2018, Section 3.1). How one step goes:

    JPEG, PNG -> uint8 (workers) -> device -> mirror, scale (whole batch) -> normalise
      -> forward (bf16 autocast) -> loss (float32) -> backward -> loss finite? -> step

Which frames make up step t, and how they are augmented, is a function of (seed, t) alone; nothing else is random
once the weights are drawn. So a run that was killed continues exactly where it stopped, on any number of processes.

    python train.py --model segnet --quick                        a few minutes on a laptop
    python train.py --model icnet --augment --weighting w1-outer  the paper's 40,000 iterations
    python train.py --model icnet --study                         the paper's whole Section 3 for one network
    torchrun --nproc_per_node=8 train.py --model hourglass        the same training on several devices
"""
import csv
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
from evaluate import IGNORE, MODELS, Batches, Parser, Problem, Split, write_atomically

WEIGHTINGS = ("none", "w1-outer", "w1-direct", "w2-outer", "w2-direct")
LOG = ("step", "train_loss", "val_loss", "train_miou", "val_miou", "val_accuracy", "val_f1", "val_body_f1",
       "lr", "images_per_s", "data_wait")
MAY_CHANGE = ("workers", "device", "precision", "compile", "iterations")        # on --resume

# What --quick puts in the place of the paper's values: small crops and few iterations, for a laptop.
QUICK = {
    "icnet": dict(size=160, batch_size=16, iterations=900, val_every=150, val_images=100),
    "segnet": dict(size=96, batch_size=16, iterations=600, val_every=100, val_images=100, lr=0.003),
    "hourglass": dict(size=128, batch_size=8, iterations=500, val_every=100, val_images=100, lr=1e-3,
                      stacks=2, features=96, stem_stride=4, joints_from=1, joints_modules=1),
}


class Trouble(Problem):
    """Something went wrong during the run that no option could have prevented: exit status 1, not 2."""
    status = 1


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is written."""


# ---------------------------------------------------------------------------------------------------------------------
# Class weights and the loss (paper, Section 3.1)
# ---------------------------------------------------------------------------------------------------------------------

def class_weights(pixels, scheme, names=None):
    """Class weights of the paper's Section 3.1.

    pixels: (K,) counts, label pixels of each class in the train split.
    scheme: "w1" = 1 - C_i / sum(C), or "w2" = B exp(-(B - mean B) / (4 std B)) with B = max(C) / C and the population
    std, scaled to max 1: as printed the weights of W2 reach into the hundreds, and SGD at 0.01 diverges.
    Returns (K,) float32. Raises Problem naming any class without pixels.
    """
    counts = torch.as_tensor(pixels, dtype=torch.float64)
    absent = [str(names[i]) if names else str(i) for i in (counts <= 0).nonzero().flatten().tolist()]
    if absent:
        raise Problem(f"--weighting {scheme} needs label pixels of every class, and the train split has none of: "
                      f"{', '.join(absent)}; train with --weighting none or add frames")
    return weight_formula(counts, scheme)


def weight_formula(counts, scheme):
    """The two formulas of class_weights, for (K,) float64 counts above 0 on any device, without looking at them."""
    if scheme == "w1":
        return (1 - counts / counts.sum()).float()
    rarity = counts.max() / counts
    spread = rarity.std(correction=0).clamp(min=1e-12)      # equal counts: equal weights
    weights = rarity * torch.exp(-(rarity - rarity.mean()) / (4 * spread))
    return (weights / weights.max()).float()


class Criterion:
    """Cross-entropy, plain or weighted: the mean over the pixels that count (label 255 does not).

    outer:  mean of w[label] * CE(logits, label), not divided by the sum of the weights, as the paper writes it
    direct: mean of CE(logits * w, label); such a network also predicts from logits * w
    """

    def __init__(self, classes, weighting="none", device="cpu"):
        self.scheme, _, self.way = weighting.partition("-")
        self.pixels = torch.tensor(classes["pixels"], dtype=torch.float64, device=device)
        self.weights = None
        if self.scheme != "none":
            self.weights = class_weights(classes["pixels"], self.scheme, classes["names"]).to(device)

    def weights_of(self, levels, ids):
        """(ids,) weights of the classes, or of the coarser ids `levels` (K,) maps them to: pixels add up first."""
        if levels is None or self.weights is None:
            return self.weights
        return weight_formula(torch.zeros_like(self.pixels[:ids]).index_add_(0, levels, self.pixels), self.scheme)

    def totals(self, logits, labels, levels=None):
        """Summed loss (float32 scalar) and number of pixels that count (int64 scalar).

        logits (B, K, H, W) any float dtype, labels (B, H', W') uint8, levels (K,) int64 or None.
        """
        if labels.shape[-2:] != logits.shape[-2:]:          # nearest-exact takes a cell's centre, nearest its corner
            labels = F.interpolate(labels[:, None], logits.shape[-2:], mode="nearest-exact")[:, 0]
        target = labels.long().flatten()
        if levels is not None:
            table = F.pad(levels, (0, IGNORE + 1 - len(levels)), value=IGNORE)
            target = table[target]
        # Channels last makes this a view, and softmax over the last axis is the fast one.
        logits = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).float()
        weights = self.weights_of(levels, logits.shape[1])
        if self.way == "direct":
            logits, weights = logits * weights, None
        loss = F.cross_entropy(logits, target, weight=weights, ignore_index=IGNORE, reduction="sum")
        return loss, (target != IGNORE).sum()

    def __call__(self, logits, labels, levels=None):
        """The mean over all processes' pixels, times their number: DistributedDataParallel averages gradients."""
        loss, count = self.totals(logits, labels, levels)
        if dist.is_initialized():
            dist.all_reduce(count)
            loss = loss * dist.get_world_size()
        return loss / count.clamp(min=1)                    # a batch without one valid pixel costs 0, not nan


# ---------------------------------------------------------------------------------------------------------------------
# Which frames, and how they are augmented: functions of (seed, step)
# ---------------------------------------------------------------------------------------------------------------------

class FrameOrder:
    """Entry t lists the frames of step t: epochs in fresh random order, end to end, cut into batches.

    A batch larger than the set runs on into the next epoch. Process r of n takes every n-th frame of each batch.
    """

    def __init__(self, frames, batch_size, steps, seed, rank=0, world=1):
        self.frames, self.batch_size, self.steps, self.seed = frames, batch_size, steps, seed
        self.rank, self.world, self.epochs = rank, world, {}

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rank::self.world]
        return [int(self.epoch(place // self.frames)[place % self.frames]) for place in places]

    def epoch(self, number):
        if number not in self.epochs:
            if len(self.epochs) > 1:                        # a batch touches two neighbours at the most, or is large
                self.epochs.clear()
            self.epochs[number] = np.random.default_rng([self.seed, 0, number]).permutation(self.frames)
        return self.epochs[number]


def draw_augmentation(seed, step, batch_size, augment, rank=0, world=1):
    """Random numbers for the whole batch of a step, of which each process keeps its share.

    Returns mirror (B,) bool; scale (B,) float32, log-uniform in 0.5 to 2; place (B, 2) float32 in 0 to 1: where the
    enlarged picture is cut, or where in the frame the shrunken one lies.
    """
    rng = np.random.default_rng([seed, 1, step])
    mirror = torch.from_numpy(rng.random(batch_size) < 0.5)
    scale = torch.from_numpy(2 ** rng.uniform(-1, 1, batch_size)).float()
    place = torch.from_numpy(rng.random((batch_size, 2))).float()
    if not {"mirror", "naive-mirror"} & set(augment):
        mirror[:] = False
    if "scale" not in augment:
        scale[:], place[:] = 1, 0
    return mirror[rank::world], scale[rank::world], place[rank::world]


def mirror_batch(images, labels, joints, chosen, classes, swap=True):
    """Flips the chosen samples left to right; what was a left hand is a right hand then, so ids and joints swap.

    images (B, 3, H, W), labels (B, H, W) uint8, joints (B, J, 2) or None, chosen (B,) bool. swap=False leaves the
    ids as they are, as the paper's code did: every picture then also says the opposite.
    """
    flipped, joints_flipped = labels.flip(-1), joints
    if swap:
        table = torch.arange(IGNORE + 1, device=labels.device, dtype=torch.uint8)
        table[:len(classes["mirror"])] = torch.tensor(classes["mirror"], dtype=torch.uint8)
        flipped = table[flipped.long()]
    if joints is not None:
        joints_flipped = joints[:, classes["joint_mirror"]] if swap else joints.clone()
        joints_flipped[..., 0] = images.shape[-1] - 1 - joints_flipped[..., 0]
        joints = torch.where(chosen[:, None, None], joints_flipped, joints)
    return (torch.where(chosen[:, None, None, None], images.flip(-1), images),
            torch.where(chosen[:, None, None], flipped, labels), joints)


def scale_batch(images, labels, joints, scale, place):
    """Enlarges or shrinks each sample within its frame: images bilinear, labels nearest, outside = mean colour / 255.

    images (B, 3, H, W) normalised float32, labels (B, H, W) uint8, joints (B, J, 2) or None, scale (B,),
    place (B, 2). With offset t = place * (W - scale W), pixel x goes to scale (x + 0.5) + t - 0.5.
    """
    size = torch.tensor([images.shape[-1], images.shape[-2]], device=images.device)          # W, H
    offset = place * (size - scale[:, None] * size)                                          # (B, 2) pixels
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = (1 - 2 * offset / size) / scale[:, None] - 1        # affine_grid counts from -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    shifted = labels[:, None].float() - IGNORE                           # grid_sample fills with 0, which would be
    labels = (F.grid_sample(shifted, grid, mode="nearest", align_corners=False) + IGNORE)[:, 0]     # background
    if joints is not None:
        joints = scale[:, None, None] * (joints + 0.5) + offset[:, None] - 0.5
    return images, labels.to(torch.uint8), joints


def prepare_batch(batch, step, args, classes, rank=0, world=1):
    """A loaded batch, on the device: augmented and normalised. Returns (images float32 channels last, batch)."""
    images, labels, joints = batch["images"], batch["labels"], batch.get("joints")
    draws = draw_augmentation(args.seed, step, args.batch_size, args.augment, rank, world)
    mirror, scale, place = (draw.to(images.device, non_blocking=True) for draw in draws)
    if {"mirror", "naive-mirror"} & set(args.augment):
        images, labels, joints = mirror_batch(images, labels, joints, mirror, classes, "mirror" in args.augment)
    images = evaluate.normalise(images, classes)
    if "scale" in args.augment:
        images, labels, joints = scale_batch(images, labels, joints, scale, place)
    batch = {**batch, "labels": labels} if joints is None else {**batch, "labels": labels, "joints": joints}
    return images.contiguous(memory_format=torch.channels_last), batch


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: a finite number from low to high; `low` itself counts for int, not for float."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        good = value is not None and math.isfinite(value) and value <= high
        if not good or (value < low if kind is int else value <= low):
            words = f"of {low} or more" if kind is int else f"above {low}"
            noun = "a whole number" if kind is int else "a number"
            limit = f" and at most {high}" if high < math.inf else ""
            raise ArgumentTypeError(f"{text!r} is not {noun} {words}{limit}")
        return value
    return convert


def build_parser():
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0],
                    epilog="Defaults are the paper's. None in the list below means: the model's recipe decides.")
    parser.add_argument("--model", choices=sorted(MODELS), help="the network (needed, but for --resume)")
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="prepared folder; without it data/surreal if there, else the stand-in, "
                       "which is rendered on first use")
    group.add_argument("--size", type=number(int, 32, 4096), help="side images are resized to, a multiple of 32; time "
                       "and memory grow with its square; metrics stay at the prepared labels' size")
    group.add_argument("--workers", type=number(int, 0, 256), default=max(1, min(8, (os.cpu_count() or 2) - 1)),
                       help="processes that read images; 0 reads in the training process")
    group = parser.add_argument_group("network")
    group.add_argument("--double-filters", action="store_true", help="twice the filters: four times the parameters "
                       "and multiply-adds, twice the activations")
    group.add_argument("--width", type=number(float, 0, 64), default=1.0, help="factor on every layer's filters")
    group.add_argument("--variant", choices=("basic", "vgg16"), default="basic", help="segnet: the paper's small one, "
                       "or the 13 layers of VGG-16 (21 times the parameters, twice the time)")
    group.add_argument("--stacks", type=number(int, 1, 16), default=4, help="hourglass: modules in a row; time and "
                       "memory grow in proportion")
    group.add_argument("--features", type=number(int, 2, 4096), default=256, help="hourglass: channels of a module")
    group.add_argument("--stem-stride", type=int, choices=(1, 2, 4), default=1, help="hourglass: 1 works at full "
                       "resolution (the paper), 4 at a quarter, with a sixteenth of the memory and time")
    group.add_argument("--coarse-to-fine", action="store_true", help="hourglass: stage s learns the coarser label set "
                       "of its level (2, 6, 12, 25 classes)")
    group.add_argument("--joints", choices=("none", "surreal", "centroids"), default="none", help="hourglass: a "
                       "parallel branch learns heat maps of the data's joints, or of the parts' centres (training "
                       "only; more memory and time)")
    group.add_argument("--joints-from", type=number(int, 1, 16), default=2, help="hourglass: the stack that feeds it")
    group.add_argument("--joints-modules", type=number(int, 1, 16), default=2, help="hourglass: its modules")
    group.add_argument("--joints-weight", type=number(float, 0, 1e6), default=1.0, help="hourglass: its loss's weight")
    group = parser.add_argument_group("loss and augmentation")
    group.add_argument("--weighting", choices=WEIGHTINGS, default="none", help="class weights (W1: 1 - frequency; W2: "
                       "exponential), on the loss (outer) or on the logits (direct)")
    group.add_argument("--augment", nargs="*", choices=("mirror", "scale", "naive-mirror"), default=[],
                       help="alone: mirror and scale (0.5 to 2); naive-mirror flips without swapping left and right, "
                       "as the paper's code did")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--iterations", type=number(int, 1), help="steps (40,000; hourglass 150,000)")
    group.add_argument("--final-iterations", type=number(int, 1), default=90000, help="--study: steps of its last run")
    group.add_argument("--batch-size", type=number(int, 1), help="images of a step over all processes; memory grows "
                       "in proportion")
    group.add_argument("--lr", type=number(float, 0, 1e3), help="learning rate at the start")
    group.add_argument("--val-every", type=number(int, 1), default=200, help="steps from one validation and "
                       "checkpoint to the next")
    group.add_argument("--val-images", type=number(int, 1), default=500, help="frames validated on (a fixed choice, "
                       "and as many of the train split); more cost time, fewer are noisier")
    group.add_argument("--bn-after", type=number(int, 0), default=0, help="batch normalisation stays frozen for this "
                       "many steps (the paper: half of them)")
    group.add_argument("--init-from", metavar="CKPT", help="start from the layers of this checkpoint that fit")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, order and augmentation")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the "
                       "device is fast at it: less than half the time, half the activations")
    group.add_argument("--compile", action=BooleanOptionalAction, default=False, help="torch.compile: minutes at the "
                       "start, faster steps after")
    group.add_argument("--checkpoint-activations", action="store_true", help="hourglass: recompute activations in the "
                       "backward pass: about 0.6 of the memory for 1.3 of the time; the result is the same")
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="run folder (default: runs/ and the options that differ from the defaults)")
    group.add_argument("--resume", nargs="?", const="", metavar="DIR", help="continue a run (without DIR: the one "
                       "these options name, or the newest)")
    group.add_argument("--quick", action="store_true", help="smaller defaults: minutes on a laptop's CPU")
    group.add_argument("--study", action="store_true", help="the paper's protocol for this model, as runs under "
                       "runs/<model>-study; the same command continues it")
    return parser


UNSET = object()
HOURGLASS_ONLY = ("stacks", "features", "stem_stride", "coarse_to_fine", "joints", "joints_from", "joints_modules",
                  "joints_weight", "checkpoint_activations")


def parse(argv):
    """The options that were given on the command line, by name; argparse fills in no defaults yet."""
    parser = build_parser()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    given = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(names, UNSET))))
    return {name: value for name, value in given.items() if value is not UNSET}


def resolve(given):
    """All options as a Namespace: the defaults, under the model's recipe, under --quick, under what was given.

    Raises Problem for combinations without meaning.
    """
    if "model" not in given:
        raise Problem(f"--model is missing: one of {', '.join(sorted(MODELS))}")
    model = given["model"]
    flag = {name: "--" + name.replace("_", "-") for name in given}
    for name in given:
        if (name in HOURGLASS_ONLY and model != "hourglass") or (name == "variant" and model != "segnet"):
            owner = "segnet" if name == "variant" else "hourglass"
            raise Problem(f"{flag[name]} is an option of {owner}, not of {model}: leave it out or use --model {owner}")
    if "double_filters" in given and "width" in given:
        raise Problem("--double-filters is --width 2: give one of the two")
    if "final_iterations" in given and "study" not in given:
        raise Problem("--final-iterations belongs to --study: use --iterations for a single run")
    recipe = MODELS[model].recipe
    defaults = {action.dest: action.default for action in build_parser()._actions if action.dest != "help"}
    defaults |= dict(iterations=recipe.get("iterations", 40000), batch_size=recipe["batch_size"], lr=recipe["lr"])
    if given.get("quick"):
        defaults |= QUICK[model]
        defaults["final_iterations"] = 2 * given.get("iterations", defaults["iterations"])
    args = Namespace(**(defaults | given))
    args.width = 2.0 if args.double_filters else args.width
    if "augment" in given:
        args.augment = sorted(set(args.augment)) or ["mirror", "scale"]
    if {"mirror", "naive-mirror"} <= set(args.augment):
        raise Problem("--augment mirror and naive-mirror exclude each other: the first swaps left and right ids")
    if args.size and args.size % 32:
        raise Problem(f"--size {args.size} is not a multiple of 32: the nearest are {args.size // 32 * 32} and "
                      f"{args.size // 32 * 32 + 32}")
    if args.joints != "none" and args.joints_from > args.stacks:
        raise Problem(f"--joints-from {args.joints_from} is more than --stacks {args.stacks}: there is no such stack")
    if args.joints == "none":
        for name in ("joints_from", "joints_modules", "joints_weight"):
            if name in given and not args.study:
                raise Problem(f"{flag[name]} does nothing without --joints surreal or --joints centroids")
    if args.study and {"weighting", "augment", "double_filters", "coarse_to_fine", "joints"} & set(given) \
            and model != "hourglass":
        raise Problem("--study tries filters, augmentation and weighting itself: leave those options out")
    if args.study and {"coarse_to_fine", "joints"} & set(given):
        raise Problem("--study tries coarse-to-fine labels and joints itself: leave those options out")
    args.bn_after = min(args.bn_after, args.iterations)
    return args


def to_argv(settings):
    """The command line that gives these settings; parsing it checks every type and range of a stored config."""
    argv = []
    for name, value in settings.items():
        if value is not None and value is not False:
            argv.append("--" + str(name).replace("_", "-"))
            argv += [] if value is True else [str(item) for item in (value if isinstance(value, list) else [value])]
    return argv


def run_name(args):
    """"segnet-double-filters": the model, and the options that differ from its defaults and change the result."""
    base = resolve({"model": args.model} | ({"quick": True} if args.quick else {}))
    words = [args.model] + (["quick"] if args.quick else [])
    for name, value in vars(args).items():
        if value == getattr(base, name) or name in ("out", "resume", "workers", "device", "precision", "compile",
                                                    "checkpoint_activations"):
            continue
        if name == "width" and args.double_filters:
            continue
        words.append(name.replace("_", "-"))
        if value is not True:
            value = [Path(value).stem] if name in ("data", "init_from") else value
            words += [str(item) for item in (value if isinstance(value, list) else [value])]
    text = "-".join(words)
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in text)[:120]


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: settings, log, curves, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def read_settings(folder):
    """The options of the run in this folder, checked like a command line. Raises Problem."""
    path = folder / "config.json"
    try:
        stored = json.loads(path.read_text())
        given = parse(to_argv(stored))
    except FileNotFoundError:
        raise Problem(f"{folder} holds no run (config.json is missing): leave --resume out to start one") from None
    except (OSError, ValueError, AttributeError, SystemExit) as error:
        raise Problem(f"{path} is not readable as the settings of a run ({type(error).__name__}): restore it, or start "
                      f"a new run with --init-from {folder / 'best.pt'}") from None
    defaults = {action.dest: action.default for action in build_parser()._actions if action.dest != "help"}
    if set(stored) != set(defaults) or "model" not in given:
        names = ", ".join(sorted(set(stored) ^ set(defaults))) or "model"
        raise Problem(f"{path} does not hold the options of this version (different: {names})")
    return Namespace(**(defaults | {"augment": [], "width": stored["width"]} | given))


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def read_log(path, until):
    """Rows of log.csv up to step `until`, as dicts of numbers; what came after the checkpoint is computed again."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows if row["step"] <= until]


def write_log(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def draw_curves(path, runs, title):
    """Loss and mIoU against steps, like the paper's Fig. 4, 8, 10 and 17. runs: {name: rows of log.csv}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for index, (name, rows) in enumerate(runs.items()):
        steps = [row["step"] for row in rows]
        for axes, kind, factor in ((top, "miou", 100), (bottom, "loss", 1)):
            for part, style in (("val", "-"), ("train", ":")):
                values = [math.nan if row[f"{part}_{kind}"] is None else factor * row[f"{part}_{kind}"] for row in rows]
                word = "validation" if part == "val" else "train"
                axes.plot(steps, values, style, color=f"C{index}", marker="." if len(rows) < 40 else None,
                          label=f"{name}, {word}" if len(runs) > 1 else word)
    top.set(ylabel="mIoU (%)", title=title, ylim=(0, None))
    bottom.set(ylabel="loss", xlabel="step", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def start_from(network, path, classes):
    """Copies every layer of a checkpoint, or of a plain state dict, that fits `network`; says what it took.

    The classification layers stay out where the checkpoint's classes are not ours. Raises Problem if nothing fits.
    """
    try:
        source = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                             # torch raises a dozen kinds for a dozen kinds of damage
        raise Problem(f"--init-from {path} cannot be read as a checkpoint ({type(error).__name__}): "
                      "it must be one of ours, or a state dict of tensors") from None
    other = source.get("classes", {}) if isinstance(source, dict) else {}
    source = source.get("weights", source) if isinstance(source, dict) else {}
    same = not isinstance(other, dict) or other.get("names", classes["names"]) == classes["names"]
    own = network.state_dict()
    taken = {name: value for name, value in source.items()
             if name in own and torch.is_tensor(value) and value.shape == own[name].shape
             and (same or not name.startswith(network.classifiers))}
    if not any(name in dict(network.named_parameters()) for name in taken):
        raise Problem(f"--init-from {path}: none of its {len(source)} entries fits a layer of this network by name and "
                      "shape; the model and its width must be the same")
    network.load_state_dict(taken, strict=False)
    left = sorted({name.rsplit(".", 1)[0] for name in own if name not in taken})
    said = f"{len(left)} layers keep their random start: {', '.join(left[:6])}{', ...' if len(left) > 6 else ''}"
    return f"--init-from {path}: took {len(taken)} of {len(own)} tensors; {said if left else 'nothing was left out'}"


def load_run(path):
    """The checkpoint to resume from. Raises Problem that names a broken file and what can stand in for it."""
    try:
        checkpoint = evaluate.load_checkpoint(path)
        if not isinstance(checkpoint.get("optimizer"), dict):
            raise Problem(f"{path} holds no optimiser state")
        return checkpoint
    except Problem as problem:
        best = path.with_name("best.pt")
        way = (f"to go on from the best one, copy {best} over it and repeat the command" if best.exists()
               else f"remove it, and --resume {path.parent} starts from step 0")
        raise Problem(f"{problem}; {way}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------

class Signals:
    """SIGINT and SIGTERM ask the loop to stop after the step; a second one stops at once."""

    def __init__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number, frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def learning_rate(recipe, lr, step, steps):
    """poly: lr (1 - t/T)^power (ICNet) · step: lr factor^(t // every) (hourglass) · constant (SegNet)."""
    arguments = recipe.get("schedule_args", {})
    if recipe["schedule"] == "poly":
        return lr * (1 - step / steps) ** arguments["power"]
    if recipe["schedule"] == "step":
        return lr * arguments["factor"] ** (step // arguments["every"])
    return lr


def build_optimizer(network, recipe, lr, device):
    """The recipe's optimiser; weight decay acts on convolution kernels, not on biases or batch normalisation."""
    kernels = [parameter for parameter in network.parameters() if parameter.ndim == 4]
    others = [parameter for parameter in network.parameters() if parameter.ndim != 4]
    arguments = dict(recipe.get("optimizer_args", {}), lr=lr)
    if device.type == "cuda" and recipe["optimizer"] in ("SGD", "Adam", "AdamW"):
        arguments["fused"] = True
    groups = [{"params": kernels, "weight_decay": recipe.get("weight_decay", 0)}, {"params": others, "weight_decay": 0}]
    return getattr(torch.optim, recipe["optimizer"])([group for group in groups if group["params"]], **arguments)


def batch_norms(network):
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def to_host(values, device):
    """Starts copying a small tensor to the host; the returned function waits for it and gives a list of floats.

    On a GPU the copy runs while the backward pass is queued behind it, so the check before the step stalls nothing.
    """
    if device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return lambda: (done.synchronize(), host.tolist())[1]


def validate(network, split, chosen, args, classes, criterion, device, interrupted):
    """Loss and confusion matrix of the chosen frames (indices), never augmented, at the labels' own size.

    Returns (loss float, confusion (K, K) int64 on the CPU), summed over processes; None if a signal came in between.
    """
    network.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, size = chosen[rank::world], min(16, max(1, args.batch_size // world))
    chunks = [mine[start:start + size] for start in range(0, len(mine), size)]
    classes_count = len(classes["names"])
    confusion = torch.zeros(classes_count, classes_count, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    weights = criterion.weights.tolist() if criterion.way == "direct" else None
    with torch.inference_mode():
        for batch in evaluate.stream(Batches(split, chunks), 0, len(chunks), args.workers, device):
            images, labels = evaluate.normalise(batch["images"], classes), batch["labels"]
            with evaluate.autocast(device, args.precision):
                prediction, logits = evaluate.predict(network, images, labels.shape[-2:], weights)
            confusion += evaluate.confusion_matrices(prediction, labels, classes_count).sum(0)
            sums += torch.stack(criterion.totals(logits, labels)).double()
            if world == 1 and interrupted():
                return None
    if world > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).item(), confusion.cpu()


def network_options(args, classes):
    """The keyword arguments of the model's class; they go into the checkpoint."""
    options = dict(num_classes=len(classes["names"]), width=args.width)
    if args.model == "segnet":
        options |= dict(variant=args.variant)
    if args.model == "hourglass":
        options |= {name: getattr(args, name) for name in HOURGLASS_ONLY}
        if args.joints == "surreal":
            options |= dict(num_joints=len(classes["joint_mirror"]))
    return options


def find_data(args, rank):
    """The prepared folder: --data, else data/surreal, else the stand-in, rendered now if need be."""
    if args.data is not None:
        return args.data
    if Path("data/surreal").exists():
        return "data/surreal"
    if rank == 0 and not Path("data/standin/classes.json").exists():
        print("No SURREAL here (data/surreal): rendering the stand-in into data/standin, once, in about two minutes. "
              "Its people are synthetic, made by this repository, and figures on it are not SURREAL's. To use SURREAL: "
              "python prepare_surreal.py --raw SURREAL/data/cmu --out data/surreal", flush=True)
        import prepare_surreal                              # only here: whoever has data needs no renderer
        status = prepare_surreal.main(["--synthesize", "--out", "data/standin"])
        if status:
            raise Problem("the stand-in could not be rendered (see above); --data DIR takes any prepared folder")
    return "data/standin"


def train(args, folder, resume=False):
    """Trains one network into the run folder; returns the folder. Raises Problem, Trouble or Stopped.

    args: all options, resolved. The loop is written out in full; every step reads like the picture at the top.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = evaluate.pick_device(f"cuda:{local}" if world > 1 and args.device in ("auto", "cuda")
                                  and torch.cuda.is_available() else args.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.batch_size % world:
        raise Problem(f"--batch-size {args.batch_size} cannot be shared out evenly to {world} processes")
    say = print if rank == 0 else lambda *words, **options: None
    args.data = find_data(args, rank)
    if world > 1:
        dist.barrier()                                      # the others wait for rank 0's rendering
    stored = Namespace(**vars(args))                        # with "auto" as it was asked for
    args = Namespace(**vars(args))
    args.precision = evaluate.pick_precision(device, args.precision)

    # Data, network, optimiser.
    classes = evaluate.read_classes(args.data)
    if classes["size"] % 32 and args.size is None:
        raise Problem(f"{args.data} is prepared at size {classes['size']}, which is no multiple of 32: give --size")
    training = Split(args.data, "train", classes, args.size, labels_at_size=True)
    measured = Split(args.data, "train", classes, args.size)
    validation = Split(args.data, "val", classes, args.size)
    chosen = [np.sort(np.random.default_rng([args.seed, 2, index]).permutation(len(split.frames))[:args.val_images])
              .tolist() for index, split in enumerate((measured, validation))]
    if args.joints == "surreal" and not training.has_joints:
        raise Problem(f"{args.data} has no train/joints.npz for --joints surreal: use --joints centroids, the centres "
                      "of the labelled parts")
    torch.manual_seed(args.seed)
    model_class = MODELS[args.model]
    try:
        network = model_class(**network_options(args, classes))
    except ValueError as error:
        raise Problem(str(error)) from None
    criterion = Criterion(classes, args.weighting, device)
    if args.init_from and not resume:
        say(start_from(network, args.init_from, classes))
    network.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    optimizer = build_optimizer(network, model_class.recipe, args.lr, device)

    # Where the run stands.
    step, best, rows = 0, -1.0, []
    if resume and (folder / "last.pt").exists():
        checkpoint = load_run(folder / "last.pt")
        try:
            network.load_state_dict(checkpoint["weights"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise Problem(f"{folder / 'last.pt'} does not fit the settings in {folder / 'config.json'} "
                          f"({str(error).splitlines()[0]})") from None
        step, best = checkpoint["step"], checkpoint["best_miou"]
        rows = read_log(folder / "log.csv", step)
        if checkpoint["classes"] != classes:
            say(f"Note: {args.data} is not what it was when {folder / 'last.pt'} was written.")
        say(f"Continuing {folder} at step {step}.")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(vars(stored), indent=1))
    say(f"{args.model}, {sum(p.numel() for p in network.parameters()):,} parameters, on {classes['source']} "
        f"({args.data}: {len(training.frames):,} train, {len(validation.frames):,} val frames, images at "
        f"{training.size}x{training.size})\n{args.iterations:,} steps of {args.batch_size} images, "
        f"{model_class.recipe['optimizer']}, learning rate {args.lr:g}, {args.precision} on {device}, seed {args.seed}; "
        f"into {folder}")
    if criterion.weights is not None:
        pairs = zip(classes["names"], criterion.weights.tolist())
        say(f"class weights, {args.weighting}: " + ", ".join(f"{name} {weight:.4f}" for name, weight in pairs))
    if world > 1 and device.type == "cpu" and args.bn_after < args.iterations:
        say("Note: synchronised batch normalisation needs GPUs; here each process normalises by its own share.")
    if args.coarse_to_fine or args.joints != "none":
        if rank == 0:
            draw_supervision(folder, training, args, classes)

    if args.compile:
        network.compile()                                   # in place: the weights keep their names
    model = network
    if world > 1:
        model = nn.parallel.DistributedDataParallel(network, [device.index] if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    norms = batch_norms(network)

    def to_train_mode():
        network.train()
        for norm in norms:
            norm.train(step >= args.bn_after)

    def save(name):
        if rank:
            return
        checkpoint = dict(model=args.model, kwargs=network_options(args, classes), weights=network.state_dict(),
                          optimizer=optimizer.state_dict(), step=step, best_miou=best, classes=classes,
                          settings=vars(stored), logit_weights=criterion.weights.tolist()
                          if criterion.way == "direct" else None)
        write_atomically(folder / name, lambda file: torch.save(checkpoint, file))

    def check_point(throughput, wait):
        """Validates, and writes best.pt, log.csv, last.pt and the curves, in the order that a kill cannot hurt."""
        nonlocal best
        results = []
        for split, indices in zip((measured, validation), chosen):
            result = validate(network, split, indices, args, classes, criterion, device, lambda: signals.received)
            if result is None:
                return
            results.append((result[0], evaluate.metrics(result[1])))
        (train_loss, on_train), (val_loss, on_val) = results
        row = dict(zip(LOG, (step, train_loss, val_loss, on_train["miou"], on_val["miou"], on_val["accuracy"],
                             on_val["f1"], on_val["body_f1"], learning_rate(model_class.recipe, args.lr, step - 1,
                                                                            args.iterations), throughput, wait)))
        rows.append(row)
        if (on_val["miou"] or 0) > best:
            best = on_val["miou"] or 0.0
            save("best.pt")
        if rank == 0:
            write_log(folder / "log.csv", rows)
        save("last.pt")
        if rank == 0:
            draw_curves(folder / "curves.png", {args.model: rows}, f"{folder.name} ({classes['source']})")
        tqdm.write(f"step {step:6d}  loss {train_loss:.4f} / {val_loss:.4f}  mIoU {100 * on_train['miou']:5.2f} / "
                   f"{100 * on_val['miou']:5.2f} %  (train / validation)  {throughput:6.1f} images/s  "
                   f"waiting for data {100 * wait:4.1f} %") if rank == 0 else None

    def due():
        last = rows[-1]["step"] if rows else 0
        return step > last and (step % args.val_every == 0 or step == args.iterations)

    order = FrameOrder(len(training.frames), args.batch_size, args.iterations, args.seed, rank, world)
    signals = Signals()
    bar = tqdm(total=args.iterations, initial=step, unit="step", disable=rank > 0 or not sys.stderr.isatty())
    try:
        if due():                                           # stopped between a step and its validation
            check_point(0.0, 0.0)
        to_train_mode()
        batches = evaluate.stream(Batches(training, order), step, args.iterations, args.workers, device)
        began, waited, images_seen = time.perf_counter(), 0.0, 0
        while step < args.iterations and not signals.received:
            asked = time.perf_counter()
            loaded = next(batches)
            waited += time.perf_counter() - asked
            images, batch = prepare_batch(loaded, step, args, classes, rank, world)
            with evaluate.autocast(device, args.precision):
                outputs = model(images)
            total, main = network.loss(outputs, batch, criterion)
            flag = torch.full((), float(signals.received), device=device)
            seen = torch.stack([total.detach(), main.detach(), flag])
            if world > 1:                                   # every process sees the same loss and the same signal
                dist.all_reduce(seen)
            seen = to_host(seen, device)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if step < args.bn_after:                        # without a gradient the optimiser leaves them alone
                for norm in norms:
                    norm.weight.grad = norm.bias.grad = None
            loss, main_loss, stop = seen()
            if not math.isfinite(loss):
                raise Trouble(f"the loss of step {step} is {loss}; the weights were not touched. The frames of that "
                              f"batch: {', '.join(batch['frames'])}. A lower --lr often helps; the checkpoint before "
                              f"it is {folder / 'last.pt'}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(model_class.recipe, args.lr, step, args.iterations)
            optimizer.step()
            step += 1
            images_seen += args.batch_size
            bar.update()
            if step == args.bn_after:
                to_train_mode()
            if step % 10 == 0 or step == args.iterations:
                elapsed = time.perf_counter() - began
                bar.set_postfix_str(f"loss {main_loss / world:.3f}, best mIoU {100 * max(best, 0):.1f} %, "
                                    f"{images_seen / elapsed:.1f} images/s", refresh=False)
            if due():
                elapsed = time.perf_counter() - began
                check_point(images_seen / elapsed, waited / elapsed)
                to_train_mode()
                began, waited, images_seen = time.perf_counter(), 0.0, 0
            if stop:
                signals.received = signals.received or int(stop)
        if signals.received:
            save("last.pt")
            raise Stopped(signals.received, step, folder)
    except StopIteration:
        raise Trouble(f"the data ended before step {step}; {folder / 'last.pt'} is kept") from None
    except OSError as error:
        raise Trouble(f"{error.filename or folder} cannot be written or read ({error.strerror or error}); the last good "
                      f"checkpoint stays as it is. When that is mended: python train.py --resume {folder}") from None
    except torch.OutOfMemoryError:
        raise Trouble(out_of_memory(args)) from None
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise Trouble(f"a data worker died at step {step} (killed, or out of memory); "
                          f"{folder / 'last.pt'} is intact: python train.py --resume {folder}") from None
        if "alloc" in str(error) and "memory" in str(error):
            raise Trouble(out_of_memory(args)) from None
        raise
    finally:
        bar.close()
        signals.restore()
    return folder


def out_of_memory(args):
    half = max(1, args.batch_size // 2)
    return (f"out of memory at --batch-size {args.batch_size}: try --batch-size {half}" if half < args.batch_size else
            "out of memory with one image: try a smaller --size, or --checkpoint-activations (hourglass)")


# ---------------------------------------------------------------------------------------------------------------------
# The study (paper, Section 3.1): one network, step by step, the better one goes on
# ---------------------------------------------------------------------------------------------------------------------

# Published: (mIoU, accuracy, F1) in percent. The F1 of ICNet and the hourglass is that of body against background, the
# F1 of SegNet the mean over classes. The hourglass's figures are the final thesis's; the paper leaves them empty.
PUBLISHED = {
    "icnet": {"normal": (38.19, 94.64, 88.17), "doubled": (27.51, 93.01, 84.97),
              "normal + augmentation": (32.60, 91.15, 91.61), "test": (45.14, 95.76, 89.73)},
    "segnet": {"normal": (38.80, 94.87, 54.34), "doubled": (39.17, 94.79, 54.49),
               "doubled + augmentation": (23.28, 89.24, 33.21), "test": (33.59, 94.62, 44.32)},
    "hourglass": {"plain": (63.19, 98.75, 95.24), "coarse-to-fine": (16.22, 90.58, 61.98),
                  "joint branch": (58.05, 97.18, 96.05), "test": (55.32, 97.02, 93.07)},
}
# Tables 2 and 5: mIoU, mean class accuracy, and the accuracy of background, head, torso, upper and lower legs, neck,
# shoulders, upper and lower arms, feet, hands, fingers, toes.
PUBLISHED_CLASSES = {
    "icnet": {
        "none": (38.2, 48.7, 98.9, 84.9, 74.78, 64.3, 53.8, 64.0, 54.2, 52.7, 39.5, 32.3, 19.8, 9.3, 9.5),
        "w1-outer": (37.5, 52.3, 97.7, 90.0, 74.8, 70.9, 61.7, 60.9, 56.0, 57.34, 50.1, 38.9, 22.9, 10.2, 11.3),
        "w1-direct": (6.5, 7.9, 99.9, 6.13, 15.5, 7.7, 0.8, 0.0, 4.7, 1.9, 0.0, 3.6, 0.0, 0.0, 0.0),
        "w2-outer": (25.8, 54.8, 89.2, 89.3, 61.6, 64.1, 65.2, 72.4, 60.3, 47.0, 46.03, 52.35, 33.4, 31.0, 36.9),
        "w2-direct": (25.5, 34.0, 99.3, 78.7, 70.7, 70.0, 59.0, 1.9, 8.9, 32.9, 15.7, 7.1, 0.5, 0.0, 0.0)},
    "segnet": {
        "none": (39.17, 49.9, 99.1, 84.2, 70.9, 63.2, 58.4, 58.1, 51.8, 52.7, 43.9, 39.9, 28.8, 12.4, 9.8),
        "w1-outer": (38.8, 55.6, 97.5, 90.3, 74.2, 66.8, 61.8, 58.3, 65.1, 62.0, 49.6, 42.0, 36.3, 25.3, 14.2),
        "w2-outer": (21.65, 56.3, 78.18, 79.8, 65.6, 60.0, 57.1, 85.8, 71.1, 52.5, 51.8, 44.2, 41.7, 34.1, 38.4)},
}


def study(args, given, folder):
    """The paper's protocol for one network, as ordinary runs under `folder`, and report.md. Returns the folder.

    icnet, segnet: normal or doubled; the better, with augmentation; the better of that, weighted (SegNet: outer only,
    as in Table 5); the best for --final-iterations; the test split. hourglass: plain, coarse-to-fine, joint branch.
    Rows that are finished are only measured again; the one that was interrupted continues.
    """
    config = folder / "config.json"
    if config.exists():
        before = vars(read_settings(folder))
        changed = [name for name, value in vars(args).items()
                   if value != before[name] and name not in ("out", "data", *MAY_CHANGE[:-1])]
        if changed:
            raise Problem(f"{folder} holds a study with another --{changed[0].replace('_', '-')} "
                          f"({before[changed[0]]}): repeat that command to continue it, or give --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(config, json.dumps(vars(args), indent=1))
    rows = {}

    def row(name, **changes):
        """Trains one row (or finishes, or skips it) and measures its best.pt on the whole validation split."""
        options = {key: value for key, value in given.items() if key not in ("study", "out", "final_iterations",
                                                                               "resume")}
        settings = resolve(options | changes)
        place = folder / name.replace(" + ", "-").replace(" ", "-")
        resume = (place / "config.json").exists()
        done = False
        if (place / "last.pt").exists():
            done = load_run(place / "last.pt")["step"] >= settings.iterations
        print(f"\n--- {name}: {'finished' if done else 'continuing' if resume else 'starting'} ({place})", flush=True)
        if not done:
            train(settings, place, resume)
        rows[name] = measure(place, "val") | {"changes": changes, "name": name, "folder": place}
        return rows[name]

    def better(old, new):
        """The row with the higher mIoU; a difference within its confidence interval is said to be one."""
        difference, half = evaluate.paired_difference(new["confusions"], old["confusions"], new["frames"])
        winner = new if difference > 0 else old
        tie = "" if abs(difference) > half else ", within its 95 % interval: over these images it may be chance"
        decisions.append(f"{new['name']} against {old['name']}: {100 * difference:+.2f} +- {100 * half:.2f} points of "
                         f"mIoU{tie}. On goes: **{winner['name']}**.")
        return winner

    decisions = []
    if args.model == "hourglass":
        joints = "surreal" if (Path(find_data(args, 0)) / "train" / "joints.npz").exists() else "centroids"
        best = row("plain")
        best = better(best, row("coarse-to-fine", coarse_to_fine=True))
        best = better(best, row("joint branch", joints=joints))
        weightings = []
    else:
        best = better(row("normal"), row("doubled", double_filters=True))
        best = better(best, row(f"{best['name']} + augmentation", augment=[], **best["changes"]))
        weightings = [name for name in WEIGHTINGS[1:] if args.model == "icnet" or name.endswith("outer")]
        unweighted = best
        for name in weightings:
            best = better(best, row(f"{unweighted['name']} + {name}", weighting=name, **unweighted["changes"]))
    final = row(f"{best['name']}, long", **{**best["changes"], "iterations": args.final_iterations})
    test = measure(final["folder"], "test") | {"name": best["name"]}
    base = None if args.model == "hourglass" else unweighted
    write_text(folder / "report.md", study_report(args, rows, base, weightings, test, decisions))
    draw_curves(folder / "curves.png", {name: read_log(one["folder"] / "log.csv", math.inf)
                                        for name, one in rows.items()},
                f"{args.model} study ({test['source']})")
    print(f"\n{(folder / 'report.md').read_text()}\nWritten: {folder / 'report.md'}, {folder / 'curves.png'}")
    return folder


def measure(folder, split):
    """The best.pt of a run over a whole split: confusions (N, K, K), frames, metrics, their 95 % half widths."""
    checkpoint = evaluate.load_checkpoint(folder / "best.pt")
    settings = checkpoint["settings"]
    device = evaluate.pick_device(settings["device"])
    model = evaluate.build_model(checkpoint).to(device, memory_format=torch.channels_last)
    classes = checkpoint["classes"]
    data = Split(settings["data"], split, classes, settings["size"])
    confusions, raw = evaluate.evaluate_split(
        model, data, classes, device, evaluate.pick_precision(device, settings["precision"]), 16, settings["workers"],
        checkpoint["logit_weights"])
    figures = evaluate.metrics(confusions.sum(0), classes["groups"])
    halves = evaluate.bootstrap(confusions, data.frames)
    return dict(confusions=confusions, frames=data.frames, figures=figures, halves=halves,
                source=classes["source"], raw=None if raw is None else evaluate.metrics(raw)["miou"],
                parameters=sum(parameter.numel() for parameter in model.parameters()))


def study_report(args, rows, base, weightings, test, decisions):
    """report.md: the paper's tables for this network, the published figures beside ours, and which step won."""
    published = PUBLISHED[args.model]
    f1 = "f1" if args.model == "segnet" else "body_f1"
    word = "mean over classes" if f1 == "f1" else "body against background"
    numbers = {"icnet": (1, 2, 3), "segnet": (4, 5, 6), "hourglass": (None, None, None)}[args.model]
    percent = lambda value: "-" if value is None else f"{100 * value:.2f}"

    def three(names_and_rows, title):
        lines = [f"## {title}", "", f"| architecture | mIoU (%) | published | accuracy (%) | published | F1, {word} (%) "
                 "| published |", "|---|---|---|---|---|---|---|"]
        for name, one, key in names_and_rows:
            cells = [name]
            for index, metric in enumerate(("miou", "accuracy", f1)):
                half = one["halves"].get(metric)
                interval = f" +- {100 * half:.2f}" if half is not None else ""
                cells += [percent(one["figures"][metric]) + interval, f"{published[key][index]:.2f}"
                          if key in published else "-"]
            lines.append(f"| {' | '.join(cells)} |")
        return lines + [""]

    lines = [f"# The study of {args.model}", "",
             f"Data: **{test['source']}**. The published columns are SURREAL's, on other frames and after 40,000 steps "
             f"(final: 90,000); here {args.iterations:,} steps (final: {args.final_iterations:,}) of {args.batch_size} "
             f"images at {args.size or 'full'} pixels, seed {args.seed}. Behind +-: 95 % intervals over the clips that "
             "were measured; another training seed moves the figures too.", ""]
    number = lambda index: f"Table {numbers[index]}: " if numbers[index] else ""
    long_run = [name for name in rows if name.endswith(", long")]
    weighted = [f"{base['name']} + {way}" for way in weightings] if base else []
    lines += three([(name, one, name) for name, one in rows.items() if name not in long_run + weighted],
                   f"{number(0)}validation")
    if weightings:
        groups = list(base["figures"]["columns"])
        lines += [f"## {number(1)}class weighting, accuracy per class (%), validation", "",
                  f"| weighting | mIoU | all classes | {' | '.join(groups)} |", "|---" * (len(groups) + 3) + "|"]
        for way in ["none", *weightings]:
            one = base if way == "none" else rows[f"{base['name']} + {way}"]
            cells = [one["figures"]["miou"], one["figures"]["class_accuracy"], *one["figures"]["columns"].values()]
            lines.append(f"| {way} | {' | '.join(percent(cell) for cell in cells)} |")
            if len(groups) == 13:
                old = PUBLISHED_CLASSES[args.model][way]
                lines.append(f"| *{way}, published* | {' | '.join(f'*{cell}*' for cell in old)} |")
        raw = [f"{way} {percent(rows[name]['raw'])} instead of {percent(rows[name]['figures']['miou'])}"
               for way, name in zip(weightings, weighted) if rows[name]["raw"] is not None]
        if raw:
            lines += ["", "Direct weighting as its authors read it, the argmax of the unweighted logits: mIoU "
                      f"{'; '.join(raw)}."]
        lines.append("")
    lines += three([(f"{test['name']}, {args.final_iterations:,} steps", test, "test")], f"{number(2)}test")
    lines += ["## Which step won", ""] + [f"- {decision}" for decision in decisions]
    lines += ["", "![loss and mIoU of every row](curves.png)", ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------

def newest_run():
    runs = sorted(Path("runs").glob("**/config.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise Problem("--resume: there is no run under runs/; start one with --model")
    return runs[-1].parent


def start(argv):
    """From the command line to a finished run. Raises Problem, Trouble or Stopped."""
    given = parse(argv)
    if "resume" in given and "study" in given:
        raise Problem("--study needs no --resume: the same command continues it")
    if "resume" in given:
        where = given["resume"] or given.get("out")
        folder = Path(where) if where else Path("runs") / run_name(resolve(given)) if "model" in given else newest_run()
        args = read_settings(folder)
        for name, value in given.items():
            stored = getattr(args, name)
            value = 2.0 if name == "width" and value == 2 else value
            if name in MAY_CHANGE:
                setattr(args, name, value)
            elif name not in ("resume", "out") and value != stored and not (name == "augment" and not value and stored):
                raise Problem(f"--{name.replace('_', '-')} {value} differs from the {stored} that {folder} was started "
                              f"with; only {', '.join('--' + one for one in MAY_CHANGE)} may change on --resume")
        return train(args, folder, resume=True)
    args = resolve(given)
    if args.study:
        return study(args, given, Path(args.out or f"runs/{args.model}-study"))
    folder = Path(args.out or Path("runs") / run_name(args))
    if any((folder / name).exists() for name in ("config.json", "last.pt", "best.pt")):
        raise Problem(f"{folder} already holds a run: continue it with --resume {folder}, or give another --out")
    return train(args, folder)


def main(argv=None):
    """Runs the command line; returns the exit status: 0, 1 (trouble on the way), 2 (bad input), 130 or 143 (signals)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        folder = start(argv)
    except Problem as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        return getattr(problem, "status", 2)
    except Stopped as stopped:
        number, step, folder = stopped.args
        again = shlex.join(["train.py", *argv] if "--study" in argv else ["train.py", "--resume", str(folder)])
        print(f"Stopped by {signal.Signals(number).name} after step {step}; everything is saved. To continue:\n"
              f"python {again}", file=sys.stderr)
        return 128 + number
    except KeyboardInterrupt:                               # between two runs of a study, or while rendering
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0 if folder else 1


if __name__ == "__main__":
    sys.exit(main())
