"""Trains a network on a prepared folder: class weights, augmentation, the loop, the study.

The procedure of "Fully Convolutional Architectures for Multi-Part Body Segmentation" (Borrego
Carazo, 2018, Section 3.1). Which frames make up step t, and how they are augmented, is a function
of (seed, t) alone, so a run that was killed continues exactly where it stopped.
Differs from the authors' code: a mirror swaps left and right, factors of scale are drawn
log-uniformly (there uniformly), and class heads start at the classes' prior.
"""
import functools
import inspect
import io
import os
import signal
import sys
from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import evaluate
from evaluate import IGNORE, MODELS, Predictor, Problem, Split, percent
from hourglass import NAMES

WEIGHTINGS = ("none", "w1-outer", "w1-direct", "w2-outer", "w2-direct")


# ---- Class weights and the loss (paper, Section 3.1)

def class_weights(counts, scheme):
    """Class weights (K,) float32 of the paper's Section 3.1.
    counts: (K,) float64, label pixels of each class in the train split, all above 0.
    scheme, with C = counts: "w1" = 1 - C / sum(C); "w2" = B exp(-(B - mean B) / (4 std B)), where
    B = max(C) / C and std is the population's, divided by its maximum, since SGD at 0.01 diverges
    otherwise. In the paper's data an error on the background costs 1/350 of one on a toe.
    """
    if scheme == "w1":
        return (1 - counts / counts.sum()).float()
    rarity = counts.max() / counts
    spread = rarity.std(correction=0).clamp(min=1e-12)      # equal counts: equal weights
    weights = rarity * torch.exp(-(rarity - rarity.mean()) / (4 * spread))
    return (weights / weights.max()).float()


class Criterion:
    """Cross-entropy, plain or weighted: the mean over the pixels that count (label 255 does not).
    Raises Problem if a weighting is chosen and some class has no pixels to weight it by.

    outer:  mean of w[label] * CE(logits, label), not divided by the sum of w, as the paper has it
    direct: mean of CE(logits * w, label); such a network also predicts from logits * w
    """

    def __init__(self, classes, weighting="none", device="cpu"):
        self.scheme, _, self.form = weighting.partition("-")
        self.pixels = torch.tensor(classes["pixels"], dtype=torch.float64, device=device)
        if self.form and 0 in classes["pixels"]:
            absent = classes["names"][classes["pixels"].index(0)]
            raise Problem(f"--weighting {weighting}: no training label has a pixel of {absent}")

    def pixels_and_weights(self, K, levels=None):
        """Pixels and class weights, (K,) each; without weighting, None for the weights. levels:
        the coarser class of each id (hourglass.level_table), whose pixels are added up first."""
        pixels = self.pixels
        if levels is not None:
            pixels = torch.zeros_like(pixels[:K]).index_add_(0, levels, pixels)
        return pixels, class_weights(pixels, self.scheme) if self.form else None

    def prior(self, K, levels=None):
        """(K,) biases that minimise this loss if features say nothing; p is each class's share of
        the train split's pixels: log p; outer: log(w p), normalised; direct: (log p) / w. Heads
        without them first spend some hundred steps on p (Lin et al., arXiv 1708.02002, 4.1)."""
        pixels, weights = self.pixels_and_weights(K, levels)
        logs = torch.log((pixels + 1) / (pixels + 1).sum())     # + 1: no class is impossible
        if self.form == "direct":
            return (logs - logs.max()) / weights
        return logs if weights is None else torch.log_softmax(logs + weights.log(), 0)

    def totals(self, logits, labels, levels=None):
        """Summed loss (float32 scalar) and number of pixels that count (int64 scalar).
        logits (B, K, H, W) of any float dtype, labels (B, H', W') uint8, levels (K',) int64."""
        if labels.shape[-2:] != logits.shape[-2:]:          # nearest-exact samples cell centres
            labels = F.interpolate(labels[:, None], logits.shape[-2:], mode="nearest-exact")[:, 0]
        target = labels.long().flatten()
        if levels is not None:
            target = F.pad(levels, (0, IGNORE + 1 - len(levels)), value=IGNORE)[target]
        # Channels last makes this a view, and softmax over the last axis is the fast one.
        logits = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).float()
        _, weights = self.pixels_and_weights(logits.shape[1], levels)
        if self.form == "direct":
            logits, weights = logits * weights, None
        loss = F.cross_entropy(logits, target, weight=weights, ignore_index=IGNORE,
                               reduction="none")            # CUDA's "sum" runs on one block
        return loss.sum(), (target != IGNORE).sum()

    def __call__(self, logits, labels, levels=None):
        """This process's sum * processes / all pixels: DDP averages it to the mean over all."""
        loss, count = self.totals(logits, labels, levels)
        if dist.is_initialized():
            dist.all_reduce(count)
            loss = loss * dist.get_world_size()
        return loss / count.clamp(min=1)                    # without a valid pixel: 0, not nan


# ---- Frames and augmentation: functions of (seed, step)

def frame_order(frames, batch_size, seed, start, steps):
    """Yields lists of indices below `frames` for range(start, steps): shuffled epochs, joined."""
    epoch = functools.lru_cache(2)(                         # a batch may need two epochs
        lambda number: np.random.default_rng([seed, 0, number]).permutation(frames))
    for step in range(start, steps):
        positions = range(step * batch_size, (step + 1) * batch_size)
        yield [int(epoch(position // frames)[position % frames]) for position in positions]


def draw_augmentation(seed, step, B):
    """mirror (B,) bool, scale (B,) in 0.5 to 2 and place (B, 2) in 0 to 1 for a step's batch."""
    rng = np.random.default_rng([seed, 1, step])
    mirror, scale, place = map(torch.from_numpy, (
        rng.random(B) < 0.5, 2 ** rng.uniform(-1, 1, B), rng.random((B, 2))))
    return mirror, scale.float(), place.float()


def mirror_batch(images, labels, joints, chosen, classes, swap=True):
    """Flips the chosen (B,) bool samples of images (B, 3, H, W), labels (B, H, W), joints (B, J, 2)
    or None. A mirrored left hand is a right hand, so ids and joints swap sides, if `swap`."""
    flipped = labels.flip(-1)
    if swap:
        table = classes["mirror"] + [*range(len(classes["mirror"]), IGNORE + 1)]
        table = torch.tensor(table, dtype=torch.uint8)
        flipped = table.to(labels.device, non_blocking=True)[flipped.long()]
    if joints is not None:
        order = classes["joint_mirror"] if swap else range(joints.shape[1])
        moved = joints[:, torch.tensor(list(order)).to(joints.device, non_blocking=True)]
        moved[..., 0] = images.shape[-1] - 1 - moved[..., 0]
        joints = torch.where(chosen[:, None, None], moved, joints)
    images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    return images, torch.where(chosen[:, None, None], flipped, labels), joints


def scale_batch(images, labels, joints, scale, place):
    """Scales normalised images (B, 3, W, W) bilinearly, labels (B, W, W) uint8 by nearest pixel and
    joints (B, J, 2) or None. place (B, 2): 0 aligns left (upper) edges, 1 right (lower). Outside
    are the mean colour and 255. Pixel x goes to scale * (x + 0.5) + offset - 0.5."""
    size = images.shape[-1]
    offset = place * (size - scale[:, None] * size)         # (B, 2), x then y
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = (1 - 2 * offset / size) / scale[:, None] - 1   # sides are -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    shifted = labels[:, None].float() - IGNORE      # grid_sample fills with 0, so 0 means ignore
    shifted = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)
    labels = (shifted + IGNORE)[:, 0].to(torch.uint8)
    if joints is not None:
        joints = scale[:, None, None] * (joints + 0.5) + offset[:, None] - 0.5
    return images, labels, joints


def prepare_batch(batch, step, args, classes, rank=0, world=1):
    """Augments and normalises a loaded batch: images (B, 3, H, W) float32, labels and joints."""
    images, labels = batch["images"], batch["labels"]
    joints = batch["joints"] if args.joints == "surreal" else None
    mirror, scale, place = (draw[rank::world].to(images.device, non_blocking=True)
                            for draw in draw_augmentation(args.seed, step, args.batch_size))
    if {"mirror", "naive-mirror"} & set(args.augment):
        images, labels, joints = mirror_batch(images, labels, joints, mirror, classes,
                                              swap="mirror" in args.augment)
    images = evaluate.normalise(images, classes)
    if "scale" in args.augment:
        images, labels, joints = scale_batch(images, labels, joints, scale, place)
    return images.contiguous(memory_format=torch.channels_last), dict(labels=labels, joints=joints)


# ---- The loop

def learning_rate(args, step):
    """The rate at a step: the recipe's schedule, times a linear rise over the first `warmup`."""
    rate = args.lr * min(1, (step + 1) / max(args.warmup, 1))
    if args.schedule == "poly":
        rate *= (1 - step / args.iterations) ** args.power
    elif args.schedule == "step":
        rate *= args.factor ** (step // args.every)
    return rate


def train(args, run_dir, checkpoint=None):
    """Trains one network into the folder run_dir, from step 0 or from a checkpoint of that run."""
    # 1. Processes that torchrun started: this is `rank` of `world`; the first validates and writes.
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and args.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local)                        # which "cuda" stands for from here on
    device, precision = evaluate.pick_device(args.device, args.precision)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))  # a validation takes long

    # 2. Data: frames to train on, and both splits to measure.
    classes, training = read_data(args, rank)
    measured = [Split(args.data, split, classes, args.size) for split in ("train", "val")]

    # 3. Network, loss and optimiser. Weight decay acts on convolution kernels alone.
    torch.manual_seed(args.seed)
    known = vars(args) | dict(num_classes=len(classes["names"]),
                              num_joints=len(classes["joint_mirror"] or ()))
    options = {name: known[name] for name in inspect.signature(MODELS[args.model]).parameters
               if name in known}
    network = MODELS[args.model](**options).to(device, memory_format=torch.channels_last)
    criterion = Criterion(classes, args.weighting, device)
    for head, levels in getattr(network, "heads", ()):
        head.bias.data.copy_(criterion.prior(len(head.bias), levels))
    if args.init_from and checkpoint is None:
        start_from(network, args.init_from)
    if world > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    groups = [dict(params=[p for p in network.parameters() if (p.ndim == 4) == kernel],
                   weight_decay=args.weight_decay * kernel) for kernel in (True, False)]
    optimizer = getattr(torch.optim, args.optimizer)(groups, lr=args.lr, **args.optimizer_args)

    # 4. Where the run stands. last.pt is the run: nothing else is needed to continue it.
    start, best, rows = 0, -1.0, []
    if checkpoint:
        if any(checkpoint["classes"][key] != classes[key] for key in ("names", "size", "pixels")):
            raise Problem(f"{args.data} has other classes or frames than the data of {run_dir}")
        changed = ", ".join(f"{name} {value}" for name, value in checkpoint["settings"].items()
                            if name not in MAY_CHANGE and value != vars(args).get(name))
        if changed:
            raise Problem(f"{run_dir} began with {changed}: other values need another --out")
        start, best, rows = checkpoint["step"], checkpoint["best_miou"], checkpoint["rows"]
        network.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    _, weights = criterion.pixels_and_weights(len(classes["names"]))
    fixed = dict(model=args.model, kwargs=options, classes=classes, settings=vars(args),
                 logit_weights=weights.tolist() if criterion.form == "direct" else None)
    predict = Predictor(fixed, network, device, precision)

    def save(name, step):
        buffer = io.BytesIO()                               # so a full disk raises an OSError
        torch.save(fixed | dict(weights=network.state_dict(), optimizer=optimizer.state_dict(),
                                step=step, best_miou=best, rows=rows), buffer)
        (run_dir / "new.pt").write_bytes(buffer.getbuffer())
        os.replace(run_dir / "new.pt", run_dir / name)      # never leaves half a file

    if rank == 0 and checkpoint is None:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))     # else a new one
        save("last.pt", 0)
    if rank == 0:
        size = sum(p.numel() for p in network.parameters())
        print(f"{args.model}, {size:,} parameters, {precision} on {device}, into {run_dir}, steps "
              f"{start} to {args.iterations}; {args.data}: {classes['source']}", flush=True)
    if args.compile:
        network.compile()                                   # in place: weights keep their names
    model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
    torch.backends.cudnn.benchmark = True
    order = frame_order(len(training.frames), args.batch_size, args.seed, start, args.iterations)
    shares = (frames[rank::world] for frames in order)
    batches = evaluate.stream(training, shares, args.workers, device)

    stop = []               # gets the first Ctrl-C or SIGTERM; the second one exits at once
    for number in (signal.SIGINT, signal.SIGTERM) if world == 1 else ():    # ranks may stop apart
        signal.signal(number, lambda n, frame: sys.exit(128 + n) if stop else stop.append(n))

    # 5. The loop.
    with tqdm(total=args.iterations, initial=start, disable=True if rank else None) as bar:
        for step, loaded in enumerate(batches, start):
            network.train()
            for norm in norms:
                norm.train(step >= args.bn_after)           # frozen, it keeps its statistics
            images, batch = prepare_batch(loaded, step, args, classes, rank, world)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                outputs = model(images)
            total, main = network.loss(outputs, batch, criterion)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if step < args.bn_after:                        # without a gradient, no update
                for norm in norms:
                    norm.weight.grad = norm.bias.grad = None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            optimizer.step()

            step += 1                                       # from here on: the steps done
            bar.update()
            due = step % args.val_every == 0 or step == args.iterations
            if step % 10 and not due and not stop:          # main.item() would wait for the GPU
                continue
            loss = main.item()
            if due and rank == 0:
                rows.append(dict(step=step, **validate(predict, measured, args)))
                loss += rows[-1]["val_loss"]                # only for the check below
            if not np.isfinite(loss):
                raise Problem(f"loss {loss} at step {step}: lower --lr, or take --precision fp32")
            if due and rank == 0:
                if rows[-1]["val_miou"] > best:
                    best = rows[-1]["val_miou"]
                    save("best.pt", step)
                write_log(run_dir, rows, classes["source"])
            if (due or stop) and rank == 0:
                save("last.pt", step)
            bar.set_postfix_str(f"loss {main.item():.3f}, best mIoU {percent(max(best, 0))} %")
            if stop:
                print(f"Stopped at step {step}: --resume {run_dir} goes on (a study: its command)")
                sys.exit(128 + stop[0])
    stop.append(0)                                          # from here on, Ctrl-C ends at once


def validate(predict, measured, args):
    """Figures of fixed frames of train and val, and the unweighted loss, the same for all runs."""
    predict.network.eval()
    unweighted, row = Criterion(predict.classes), {}
    for i, (name, split) in enumerate(zip(("train", "val"), measured)):
        chosen = np.random.default_rng([2, i]).permutation(len(split.frames))[:args.val_images]
        confusions, row[f"{name}_loss"] = evaluate.evaluate_split(
            predict, split, min(16, args.batch_size), args.workers, sorted(chosen), unweighted)
        figures = evaluate.scores(confusions.sum(0))
        row |= {f"{name}_{key}": float(figures[key]) for key in evaluate.FIGURES}
    return row


def write_log(run_dir, rows, note):
    """log.csv and curves.png, for people: the run itself is continued from last.pt."""
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    (run_dir / "log.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    draw_curves(run_dir / "curves.png", {run_dir.name: rows}, note)
    tqdm.write("step {step}: mIoU train {train_miou:.1%}, val {val_miou:.1%}".format(**rows[-1]))


def draw_curves(path, runs, note):
    """Loss and mIoU against steps, as in the paper's Fig. 4, 8, 10, 17. runs: {name: log rows}."""
    sheet = Figure((10, 7), dpi=110, layout="constrained")
    top, bottom = sheet.subplots(2, 1, sharex=True)
    for index, (name, rows) in enumerate(runs.items()):
        for part, style in (("val", "-"), ("train", ":")):
            for axes, kind in ((top, "miou"), (bottom, "loss")):
                axes.plot([row["step"] for row in rows], [row[f"{part}_{kind}"] for row in rows],
                          style, color=f"C{index}", marker=".", label=f"{name}, {part}")
    top.set(ylabel="mIoU", title=note, ylim=(0, None))
    bottom.set(ylabel="loss, unweighted", xlabel="step", ylim=(0, None))
    sheet.legend(*top.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    sheet.savefig(path)


# ---- What the loop stands on: data, first weights, processes, signals

def read_data(args, rank):
    """Classes and train split. The first process makes and checks them while the others wait."""
    if rank:
        dist.barrier()
    args.data = args.data or ("data/surreal" if Path("data/surreal").exists() else "data/standin")
    if args.data == "data/standin" and not Path("data/standin/classes.json").exists():
        print("There is no data/surreal: rendering a stand-in, which is not SURREAL.", flush=True)
        import prepare_surreal                              # not needed by those who have data
        if status := prepare_surreal.main(["--synthesize", "--out", "data/standin"]):
            sys.exit(status)                                # it has said why
    classes = evaluate.read_classes(args.data, count=True)
    training = Split(args.data, "train", classes, args.size, labels_at_size=True)
    if training.size % 32:
        raise Problem(f"{args.data} has {training.size} pixels, no multiple of 32: give --size")
    if args.coarse_to_fine and classes["names"] != NAMES:
        raise Problem(f"--coarse-to-fine is for SURREAL's 25 classes, and {args.data} has others")
    if args.joints == "surreal" and (training.joints is None or not classes["joint_mirror"]):
        raise Problem(f"{args.data} has no joints or joint_mirror: use --joints centroids")
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return classes, training


def start_from(network, path):
    """Copies the tensors that fit by name and shape. Raises Problem if no convolution fits."""
    checkpoint, _ = evaluate.load_checkpoint(evaluate.find_checkpoint(path))
    own = network.state_dict()
    taken = {name: value for name, value in checkpoint["weights"].items()
             if name in own and value.shape == own[name].shape}
    if not any(value.ndim == 4 for value in taken.values()):
        raise Problem(f"nothing in --init-from {path} fits this network: model or width differ")
    network.load_state_dict(taken, strict=False)
    print(f"--init-from {path}: took {len(taken)} of {len(own)} tensors")


# ---- The study (paper, Section 3.1): the better one of each comparison is developed further

# Published mIoU, accuracy, F1 (body; SegNet: mean over classes), percent. Hourglass: the thesis.
PUBLISHED = dict(
    icnet={"normal": (38.19, 94.64, 88.17), "doubled": (27.51, 93.01, 84.97),
           "normal + augmentation": (32.60, 91.15, 91.61), "test": (45.14, 95.76, 89.73)},
    segnet={"normal": (38.80, 94.87, 54.34), "doubled": (39.17, 94.79, 54.49),
            "doubled + augmentation": (23.28, 89.24, 33.21), "test": (33.59, 94.62, 44.32)},
    hourglass={"plain": (63.19, 98.75, 95.24), "coarse-to-fine": (16.22, 90.58, 61.98),
               "joint head": (58.05, 97.18, 96.05), "test": (55.32, 97.02, 93.07)})


def study(args, out):
    """The paper's protocol as ordinary runs in `out`. ICNet, SegNet: normal or doubled; the better
    one augmented; the better of these with each weighting (SegNet: outer, Table 5); the best for
    longer. Hourglass: plain, coarse-to-fine, joints. Then the test split. Runs can be continued."""
    classes, training = read_data(args, 0)
    Split(args.data, "test", classes)                       # if it is missing, fail now
    runs, decisions, hourglass = {}, [], args.model == "hourglass"

    def run(name, **changes):
        run_dir = out / "-".join(name.replace(" +", "").replace(",", "").split())
        own = dict(study=False, augment=["none"], resume="newest", final_iterations=0) | changes
        last = run_dir / "last.pt"
        checkpoint = evaluate.load_checkpoint(last)[0] if last.exists() else None
        train(Namespace(**vars(args) | own), run_dir, checkpoint)       # a finished run: no steps
        figures = evaluate.measure(run_dir / "best.pt", args, "val", args.data)
        runs[name] = figures | dict(name=name, run_dir=run_dir, changes=changes)
        return runs[name]

    def better(old, new):
        difference, half = evaluate.paired_difference(new["confusions"], old["confusions"],
                                                      new["split"].clips)
        winner = new if difference > 0 else old
        chance = "" if abs(difference) >= half else ", which may be chance"
        decisions.append(f"- {new['name']} against {old['name']}: {percent(difference, half, 2)} "
                         f"points of mIoU{chance}. The study goes on with **{winner['name']}**.")
        return winner

    if hourglass:
        best = run("plain")
        if classes["names"] == NAMES:
            best = better(best, run("coarse-to-fine", coarse_to_fine=True))
        known = training.joints is not None and classes["joint_mirror"]
        best = better(best, run("joint head", joints="surreal" if known else "centroids"))
    else:
        base = run("normal")
        if "width" in inspect.signature(MODELS[args.model]).parameters:
            base = better(base, run("doubled", width=2 * args.width))
        base = best = better(base, run(f"{base['name']} + augmentation", **base["changes"],
                                       augment=["mirror", "scale"]))
        for weighting in WEIGHTINGS[1:]:
            if args.model != "segnet" or weighting.endswith("outer"):
                best = better(best, run(f"{base['name']} + {weighting}", **base["changes"],
                                        weighting=weighting))
    longer = args.final_iterations or (args.iterations * 2 if args.quick else 90000)
    if args.final_iterations or not hourglass:              # its study has no longer run
        best = run(f"{best['name']}, long", **best["changes"], iterations=longer)
    test = evaluate.measure(best["run_dir"] / "best.pt", args, "test", args.data)
    published = PUBLISHED.get(args.model, {}).items()
    text = "\n".join([
        f"# The study of {args.model}, seed {args.seed}\n", *decisions, "\n![curves](curves.png)\n",
        evaluate.markdown([["published, %", "mIoU", "accuracy", "F1"],
                           *([name, *figures] for name, figures in published)]),
        evaluate.report_text([*runs.values()], per_class=False), "", evaluate.report_text([test])])
    (out / "report.md").write_text(text, encoding="utf-8")
    logs = {name: evaluate.load_checkpoint(run["run_dir"] / "last.pt")[0]["rows"]
            for name, run in runs.items()}
    draw_curves(out / "curves.png", logs, classes["source"])
    print(text)


# ---- Command line

# What --quick puts in the place of the paper's values: seven minutes on two cores, chosen by trial.
SHORT = dict(optimizer="AdamW", optimizer_args={}, weight_decay=0.1, schedule="poly", power=1.0,
             warmup=100, batch_size=8, val_images=200, augment=["mirror"])
QUICK = dict(
    icnet=SHORT | dict(size=192, width=0.5, lr=0.005, iterations=3600, val_every=600),
    segnet=SHORT | dict(size=96, width=0.5, lr=0.004, iterations=2700, val_every=450),
    hourglass=SHORT | dict(size=96, lr=0.005, iterations=4500, val_every=750, stacks=1,
                           features=128, stem_stride=4, joints_from=1, joints_modules=1))
DEFAULTS = dict(optimizer_args={}, weight_decay=0.0, warmup=0, power=1.0, val_every=200,
                val_images=500, data="", init_from="", out="", resume="")   # if no recipe differs
MAY_CHANGE = {*"workers device precision compile iterations out resume data".split()}  # --resume
SET_BY_STUDY = {"width", "double_filters", "weighting", "augment", "coarse_to_fine", "joints"}


def build_parser():
    recipes = "; ".join(f"{model}: {network.recipe}" for model, network in MODELS.items())
    parser = evaluate.Parser(prog="train.py", description=__doc__.split("\n\n")[0],
                             epilog=f"Defaults for each model: {recipes}; else {DEFAULTS}")
    parser.add_argument("--model", choices=sorted(MODELS), default=SUPPRESS, help="the network")
    add = parser.add_argument_group("data, network").add_argument
    add("--data", default=SUPPRESS, help="prepared folder; else data/surreal or data/standin")
    add("--size", type=int, default=0, help="side of the images, a multiple of 32; 0: as prepared")
    add("--double-filters", action="store_true", help="twice the filters of every layer: --width 2")
    add("--width", type=float, default=1.0, help="factor on the number of filters of every layer")
    add("--variant", choices=("basic", "vgg16"), default="basic", help="segnet: small or full form")
    add("--stacks", type=int, default=4, help="hourglass: number of modules, one after the other")
    add("--features", type=int, default=256, help="hourglass: channels of a module")
    add("--stem-stride", type=int, choices=(1, 2, 4), default=1, help="hourglass: 4 works at 1/4")
    add("--coarse-to-fine", action="store_true", help="hourglass: 2, 6, 12, then 25 classes")
    add("--joints", choices=("none", "surreal", "centroids"), default="none",
        help="hourglass: a training branch finds the data's joints or the centres of the parts")
    add("--joints-from", type=int, default=2, help="hourglass: module that feeds that branch")
    add("--joints-modules", type=int, default=2, help="hourglass: modules of the joints' branch")
    add("--checkpoint-activations", action="store_true", help="hourglass: less memory, more time")
    add = parser.add_argument_group("loss, augmentation, optimisation").add_argument
    add("--weighting", choices=WEIGHTINGS, default="none", help="class weights, see Criterion")
    add("--augment", nargs="*", default=["none"], choices="mirror scale naive-mirror none".split(),
        help="alone: mirror and scale; naive-mirror does not swap the labels of left and right")
    add("--iterations", type=int, default=SUPPRESS, help="training steps")
    add("--batch-size", type=int, default=SUPPRESS, help="images in a step, over all processes")
    add("--lr", type=float, default=SUPPRESS, help="first learning rate")
    add("--val-every", type=int, default=SUPPRESS, help="steps between validations")
    add("--val-images", type=int, default=SUPPRESS, help="images of train and val in a validation")
    add("--bn-after", type=int, default=0, help="steps before batch normalisation starts to learn")
    add("--init-from", default=SUPPRESS, metavar="CKPT", help="start with a checkpoint's weights")
    add("--seed", type=int, default=0, help="of first weights, order of images and augmentation")
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile, for GPUs")
    add = parser.add_argument_group("run").add_argument
    add("--out", default=SUPPRESS, help="folder of a new run; else runs/, named after options")
    add("--resume", nargs="?", const="newest", default=SUPPRESS, metavar="DIR",
        help="continue a run (the newest); with --model and --out, start it where there is none")
    add("--quick", action="store_true", help="other defaults: some minutes on a laptop's CPU")
    add("--study", action="store_true", help="the paper's series of runs, in runs/<model>-study")
    add("--final-iterations", type=int, default=0, help="steps of a study's last run; 0: 90,000")
    return parser


def parse(argv):
    """(options, run folder, checkpoint to continue or None). Raises Problem."""
    parser = build_parser()
    typed, checkpoint = vars(parser.parse_args(argv)), None     # to learn the model; again below
    model, resume, study = typed.get("model"), typed.get("resume"), typed["study"]
    name = [Path(word.lstrip("-")).name for word in argv if word not in ("--model", "--resume")]
    run_dir = Path(typed.get("out", f"runs/{model}-study" if study else f"runs/{'-'.join(name)}"))
    if resume and not study:
        searched = run_dir if model or "out" in typed else "runs"
        run_dir = Path(searched if resume == "newest" else resume)
        if not model or run_dir.is_file() or (run_dir / "last.pt").is_file():
            path = evaluate.find_checkpoint(run_dir, "last.pt")
            checkpoint, run_dir = evaluate.load_checkpoint(path)[0], path.parent
            model = checkpoint["model"]
    elif not model:
        raise Problem(f"--model is missing: {', '.join(sorted(MODELS))}")
    elif run_dir.exists() and not study:
        raise Problem(f"{run_dir} exists: --resume {run_dir} goes on, --out starts another")
    own = inspect.signature(MODELS[model]).parameters.keys()
    others = set().union(*(inspect.signature(kind).parameters for kind in MODELS.values())) - own
    for option in (others & typed.keys()) | (SET_BY_STUDY if study else set()):
        if typed[option] != parser.get_default(option):
            raise Problem(f"--{option.replace('_', '-')} is no option of {model}"
                          f"{' --study' if study else ''}: leave it out")
    if typed["double_filters"] and typed["width"] != 1:
        raise Problem("--double-filters is --width 2: give one of the two")
    if checkpoint:
        parser.set_defaults(**checkpoint["settings"])
    else:
        quick = QUICK.get(model, {}) if typed["quick"] else {}
        parser.set_defaults(**DEFAULTS | MODELS[model].recipe | quick)
        if quick:
            print("--quick:", quick, "where no option says otherwise")
    args = parser.parse_args(argv)                          # now with that model's defaults
    args.augment = args.augment or ["mirror", "scale"]
    if args.double_filters and not checkpoint:
        args.width *= 2
    if min(args.batch_size, args.val_every, args.val_images, args.stacks, args.joints_from,
           args.joints_modules, args.size + 1, args.workers + 1, args.seed + 1, args.lr >= 0) < 1:
        raise Problem("--val-every and counts start at 1, --lr, --size, --workers, --seed at 0")
    if args.size % 32:
        raise Problem(f"--size {args.size} is no multiple of 32: {args.size // 32 * 32 + 32} is")
    if (args.coarse_to_fine or study and model == "hourglass") and args.stacks == 1:
        raise Problem("coarse-to-fine labels need --stacks 2 or more (--quick has one)")
    if int(os.environ.get("WORLD_SIZE", 1)) > (1 if study else args.batch_size):
        raise Problem("torchrun: --batch-size is at least the processes; --study runs in one")
    if args.init_from and not checkpoint:
        evaluate.load_checkpoint(evaluate.find_checkpoint(args.init_from))
    return args, run_dir, checkpoint


def start(argv):
    """From the command line to a finished run. Returns the exit status."""
    args, run_dir, checkpoint = parse(argv)
    if args.study:
        study(args, run_dir)
    else:
        train(args, run_dir, checkpoint)
    return 0


if __name__ == "__main__":
    evaluate.run_command("train.py", lambda: start(sys.argv[1:]))
