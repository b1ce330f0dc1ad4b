"""Measures what the README's section "Speed" says. Not collected by pytest: it asserts nothing.

    python tests/benchmark.py                     everything, six to ten minutes on two cores
    python tests/benchmark.py networks feeding    some of it; --help lists the parts
    python tests/benchmark.py networks --only icnet

Every ratio is measured side by side: the two ways take turns in one process, and medians are
compared, since the speed of a shared machine drifts more than most differences. On a GPU the
networks run at the paper's batch sizes, and are set against the card's own bf16 matrix rate.
"""
import argparse
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate                                             # noqa: E402
import prepare_surreal                                      # noqa: E402
import train                                                # noqa: E402
from tiny import write_prepared                             # noqa: E402

# name, options, images of a step on the CPU. The paper's batch sizes are kept for the GPU.
NETWORKS = [
    ("icnet", dict(), 8), ("icnet", dict(width=2), 8),
    ("segnet", dict(), 2), ("segnet", dict(width=2), 1),
    ("hourglass", dict(stem_stride=4), 2), ("hourglass", dict(), 1),
    ("hourglass", dict(width=2), 1)]
SIZE = 320


def label(model, kwargs):
    return " ".join([model, *(f"{key.replace('_', ' ')} {value}" for key, value in kwargs.items())])


def show(title, header, rows):
    print(f"\n### {title}\n\n" + evaluate.markdown([header, *rows]), flush=True)


def side_by_side(ways, rounds, seconds):
    """Median seconds of each of `ways` {name: function}, which take turns: at least `rounds` each,
    and more while fewer than `seconds` have passed."""
    times = {name: [] for name in ways}
    for function in ways.values():                          # the first call allocates and compiles
        function()
    began = time.perf_counter()
    while len(times[next(iter(ways))]) < rounds or time.perf_counter() - began < seconds:
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# ------------------------------------------------------------------------------- the networks

def plain_criterion(logits, labels, levels=None):
    """Cross-entropy as a first sketch has it."""
    labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0]
    return F.cross_entropy(logits, labels.long(), ignore_index=evaluate.IGNORE)


def ways_to_run(model, kwargs, batch, device, precision, compiled=False):
    """{"plain" or "ours": (function of an inference, function of a training step)}.

    plain: float32, NCHW, eager. ours: what evaluate.py and train.py (with --compile) do.
    """
    classes = dict(pixels=[1] * 25, names=list(range(25)))
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    labels = torch.randint(0, 25, (batch, SIZE, SIZE), device=device, dtype=torch.uint8)
    ways = {}
    for name in ("plain", "ours"):
        network = evaluate.MODELS[model](**kwargs).to(device)
        data, criterion, how = images, plain_criterion, "fp32"
        if name == "ours":
            network = network.to(memory_format=torch.channels_last)
            data = images.contiguous(memory_format=torch.channels_last)
            criterion, how = train.Criterion(classes, device=device), precision
            if compiled:
                network.compile()
        optimizer = train.build_optimizer(network, network.recipe, 1e-4, device)

        def infer(network=network, data=data, how=how):
            network.eval()
            with evaluate.autocast(device, how):
                if how == "fp32":
                    with torch.no_grad():
                        network(data).argmax(1)
                else:
                    evaluate.predict(network, data, (SIZE, SIZE))
            wait_for(device)

        def step(network=network, data=data, how=how, criterion=criterion, optimizer=optimizer):
            network.train()
            with evaluate.autocast(device, how):
                outputs = network(data)
            total, _ = network.loss(outputs, dict(labels=labels), criterion)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            wait_for(device)

        ways[name] = infer, step
    return ways


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device):
    """Multiply-adds a second of a large bf16 matrix product: what the card can do at best."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = side_by_side({"product": lambda: (a @ b, wait_for(device))}, 20, 2)["product"]
    return 8192 ** 3 / seconds


def networks(options):
    """This repository against plain PyTorch, inference and training, at 320x320."""
    device = evaluate.pick_device()
    precision = evaluate.pick_precision(device)
    rows = []
    for model, kwargs, batch in NETWORKS:
        cuda = device.type == "cuda"
        hopeless = not cuda and model == "hourglass" and kwargs.get("stem_stride") != 4
        if hopeless or options.only not in label(model, kwargs):        # minutes a step
            continue
        batch = evaluate.MODELS[model].recipe["batch_size"] if cuda else batch
        slow = model != "icnet" and not cuda
        row = [label(model, kwargs), batch]
        try:
            ways = ways_to_run(model, kwargs, batch, device, precision)
            for kind in (0, 1):
                times = side_by_side({name: functions[kind] for name, functions in ways.items()},
                                     2 if slow else 5, 4 if slow else 8)
                plain, ours = batch / times["plain"], batch / times["ours"]
                row += [f"{plain:.2f}", f"{ours:.2f}", f"**{ours / plain:.1f}**"]
        except torch.OutOfMemoryError:                      # of a GPU: costs this row alone
            row += ["out of memory"] * (8 - len(row))
        rows.append(row)
    cores = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    show(f"Networks at {SIZE}x{SIZE}: images/s, plain (float32, NCHW) and ours ({precision}, "
         f"channels last), {device.type}{cores}",
         ["network", "batch", "inference: plain", "ours", "ratio", "training: plain", "ours",
          "ratio"], rows)


def batches(options):
    """What a small batch costs: ours, training ICNet."""
    device = evaluate.pick_device()
    precision, rows = evaluate.pick_precision(device), []
    for batch in (1, 2, 4, 8, 16, 64) if device.type == "cpu" else (1, 4, 16, 64, 256):
        _, step = ways_to_run("icnet", {}, batch, device, precision)["ours"]
        rows.append([batch, f"{batch / side_by_side({'step': step}, 3, 2)['step']:.1f}"])
    show("ICNet training, images/s by batch size", ["batch", "images/s"], rows)


def gpu(options):
    """On a GPU: images/s, share of the matrix rate, memory, and the hours of the paper's study."""
    device = evaluate.pick_device()
    if device.type != "cuda":
        print("\n### GPU\n\nno GPU at hand: not measured\n")
        return
    rate, rows, hours = matrix_rate(device), [], 0
    steps = {"icnet": 7 * 40000 + 90000, "segnet": 5 * 40000 + 90000, "hourglass": 3 * 150000}
    for model, kwargs, _ in NETWORKS:
        if options.only not in label(model, kwargs):
            continue
        batch = evaluate.MODELS[model].recipe["batch_size"]
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
            evaluate.MODELS[model](**kwargs).eval()(torch.zeros(1, 3, SIZE, SIZE))
        work = 3 * batch * flops.get_total_flops() / 2      # backward: twice the forward pass
        row = [label(model, kwargs), batch]
        for compiled in (False, True):
            gc.collect()                                    # the network before this one
            try:
                _, step = ways_to_run(model, kwargs, batch, device, "bf16", compiled)["ours"]
                step()                                      # cuDNN tries its algorithms
                torch.cuda.reset_peak_memory_stats()
                seconds = side_by_side({"step": step}, 10, 5)["step"]
            except Exception as error:                      # out of memory, the compiler's own
                row += [type(error).__name__] * (1 if compiled else 3)
                continue
            row.append(f"{batch / seconds:.0f}")
            if not compiled:
                used = torch.cuda.max_memory_allocated() / 2**30
                row += [f"{100 * work / seconds / rate:.0f} %", f"{used:.1f}"]
                paper = kwargs.get("stem_stride", 1) == 1 and kwargs.get("width", 1) == 1
                hours += steps[model] * seconds / 3600 if paper else 0
        rows.append(row)
        print(*row, flush=True)                             # should the rest take too long
    show(f"{torch.cuda.get_device_name()}, bf16, {2 * rate / 1e12:.0f} TFLOP/s in a matrix product",
         ["network", "batch", "training images/s", "of the matrix rate", "peak GiB",
          "images/s with --compile"], rows)
    print(f"The paper's three studies take at least {hours:.0f} hours at these rates: all rows "
          "counted with normal filters, validation not counted")


MEMORY = """
import pathlib, sys, time
sys.path.insert(0, {place!r})
import torch, evaluate, train
torch.manual_seed(0)
network = evaluate.MODELS["hourglass"](stem_stride={stride}, checkpoint_activations={again})
network = network.to(memory_format=torch.channels_last).train()
optimizer = train.build_optimizer(network, network.recipe, 1e-4, torch.device("cpu"))
images = torch.randn(1, 3, 320, 320).contiguous(memory_format=torch.channels_last)
batch = dict(labels=torch.randint(0, 25, (1, 320, 320), dtype=torch.uint8))
criterion = train.Criterion(dict(pixels=[1] * 25, names=list(range(25))))
for turn in range({turns}):
    start = time.perf_counter()
    with evaluate.autocast(torch.device("cpu"), "bf16"):
        outputs = network(images)
    total, _ = network.loss(outputs, batch, criterion)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
status = pathlib.Path("/proc/self/status").read_text()      # ru_maxrss would count the parent's too
print(int(status.split("VmHWM:")[1].split()[0]) / 2**20, 1 / seconds)
"""


def memory(options):
    """Peak memory of the whole process and images/s of the hourglass, one image at 320x320, CPU."""
    rows, place = [], str(Path(__file__).resolve().parent.parent)
    for stride, turns in ((1, 2), (4, 6)):
        for again in (False, True):
            program = MEMORY.format(place=place, stride=stride, again=again, turns=turns)
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            figures = done.stdout.split() or ["nan", "nan"]
            rows.append([stride, "recomputed" if again else "kept",
                         *(f"{float(figure):.2f}" for figure in figures)])
    show("Hourglass 4 x 256, one image at 320x320, bf16, CPU: training step",
         ["stem stride", "activations", "peak GiB of the process", "images/s"], rows)


# ------------------------------------------------------------------------------- the data

def prepared(options, frames=200):
    """--data, or a temporary folder of drawn bars. Returns (folder, the object that removes it)."""
    if Path(options.data, "classes.json").is_file():
        return options.data, None
    place = tempfile.TemporaryDirectory()
    return write_prepared(Path(place.name) / "bars", frames=frames, size=SIZE), place


def feeding(options):
    """What the data cost: reading in the workers, the pass on the device, waiting in a real run."""
    data, place = prepared(options)
    classes, device = evaluate.read_classes(data), evaluate.pick_device()
    split = evaluate.Split(data, "train", classes, labels_at_size=True)
    chosen, rows = list(range(min(64, len(split.frames)))), []

    def bare():
        for index in chosen:
            for kind, end in (("images", "jpg"), ("labels", "png")):
                Image.open(split.folder / kind / f"{split.frames[index]}.{end}").load()

    times = side_by_side({"bare": bare, "ours": lambda: split.load(chosen)}, 3, 3)
    rows.append(["decoding JPEG and PNG, Pillow alone", f"{len(chosen) / times['bare']:.0f}"])
    rows.append(["a worker: decoded, checked, stacked", f"{len(chosen) / times['ours']:.0f}"])
    batch = split.load(chosen[:16])
    batch = {key: value.to(device) if torch.is_tensor(value) else value
             for key, value in batch.items()}
    for augment in ([], ["mirror"], ["mirror", "scale"]):
        args = argparse.Namespace(seed=0, batch_size=16, augment=augment, joints="none")
        seconds = side_by_side({"ours": lambda: (train.prepare_batch(batch, 0, args, classes),
                                                 wait_for(device))}, 5, 2)["ours"]
        rows.append([f"normalised on {device.type}, {' and '.join(augment) or 'not'} augmented",
                     f"{16 / seconds:.0f}"])
    with tempfile.TemporaryDirectory() as folder:
        for model, batch in (("icnet", "8"), ("segnet", "2")):
            how = ["--iterations", "20", "--val-every", "20", "--batch-size", batch]
            if device.type == "cuda":                       # the paper's batch, and no first steps
                how = ["--iterations", "200", "--val-every", "100"]
            train.main(["--model", model, "--data", str(data), "--val-images", "2", "--augment",
                        "--out", f"{folder}/{model}", *how])
            row = train.read_log(Path(folder, model, "log.csv"))[-1]
            rows.append([f"{model}: trained", f"{row['images_per_s']:.1f}"])
            rows.append([f"{model}: share of the time that waited for data",
                         f"{100 * row['data_wait']:.1f} %"])
    show(f"Feeding, {classes['size']}x{classes['size']}", ["step", "images/s"], rows)


def evaluation(options):
    """What evaluation costs after the argmax, with SegNet-Basic, and the bootstrap at full size."""
    images, K = 32, 25
    device = evaluate.pick_device()
    precision = evaluate.pick_precision(device)
    model = evaluate.MODELS["segnet"]().to(device, memory_format=torch.channels_last).eval()
    data = torch.randn(4, 3, SIZE, SIZE, device=device).contiguous(
        memory_format=torch.channels_last)
    labels = torch.randint(0, K, (4, SIZE, SIZE), dtype=torch.uint8, device=device)
    predicting = counting = 0
    for turn in range(1 + images // 4):                     # the first one warms up
        start = time.perf_counter()
        with evaluate.autocast(device, precision):
            prediction, _ = evaluate.predict(model, data, (SIZE, SIZE))
        wait_for(device)
        middle = time.perf_counter()
        matrices = evaluate.confusion_matrices(prediction, labels, K)
        wait_for(device)
        if turn:
            predicting += middle - start
            counting += time.perf_counter() - middle
    confusions = matrices.cpu().repeat(50, 1, 1)            # 200 images
    frames = [f"clip{index // 5:04d}_{index % 5:03d}" for index in range(200)]
    figures = side_by_side({"metrics": lambda: (
        evaluate.metrics(confusions.sum(0)), evaluate.bootstrap(confusions, frames))}, 3, 2)
    after = 200 / images * counting + figures["metrics"]
    many = confusions[:1].expand(15000, -1, -1)
    names = [f"clip{index // 30:04d}_{index % 30:03d}" for index in range(15000)]
    start = time.perf_counter()
    evaluate.bootstrap(many, names)
    bootstrap = time.perf_counter() - start
    show("Evaluation, SegNet-Basic, 200 images of 320x320", ["part", "seconds"], [
        ["network and argmax", f"{200 / images * predicting:.1f}"],
        ["confusion matrices", f"{200 / images * counting:.2f}"],
        ["figures and their intervals", f"{figures['metrics']:.2f}"],
        ["matrices, figures and intervals, of the whole",
         f"{100 * after / (after + 200 / images * predicting):.1f} %"],
        ["intervals over 15,000 images, 1,000 draws", f"{bootstrap:.2f}"]])


def memory_now():
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def growth(options):
    """Starting on 120,000 frames, and the cost of an image, a step and their memory as they grow.

    The files are links to a few, so this is about names and lists, not about decoding.
    """
    rows = []
    with tempfile.TemporaryDirectory() as place:
        few = write_prepared(Path(place) / "few", frames=4, size=32)
        many, classes = Path(place) / "many", evaluate.read_classes(few)
        for count in (1200, 12000, 120000):
            for kind, end in (("images", "jpg"), ("labels", "png")):
                folder = many / "train" / kind
                folder.mkdir(parents=True, exist_ok=True)
                sources = sorted((few / "train" / kind).iterdir())
                for index in range(len(list(folder.iterdir())), count):
                    (folder / f"clip{index // 50:05d}_{index % 50:03d}.{end}").hardlink_to(
                        sources[index % 4])
            start = time.perf_counter()
            split = evaluate.Split(many, "train", classes)
            starting = time.perf_counter() - start
            order = train.FrameOrder(count, 64, 10**6, seed=0)
            start = time.perf_counter()
            for step in range(40):
                split.load(order[step])
            loading = (time.perf_counter() - start) / 40 / 64
            before = memory_now()
            for step in range(40, 20000):
                order[step]
            rows.append([f"{count:,}", f"{starting:.2f}", f"{1e3 * loading:.2f}",
                         f"{memory_now() - before:.1f}"])
    show("Growth", ["frames", "seconds to start", "milliseconds an image",
                    "MiB more after 20,000 steps of frame order"], rows)


# ------------------------------------------------------------------------------- preparation

def preparation(options):
    """Rendering, and preparing against the bare cost of decoding, reading and encoding."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        rendered = {}
        for clips, frames in ((150, 2), (20, 30), (40, 5)):             # the last one is prepared
            start = time.perf_counter()
            prepare_surreal.synthesize(Path(place) / f"raw{frames}", clips, frames, workers=2)
            rendered[frames] = (clips + 2 * max(2, clips // 10)) * frames / (
                time.perf_counter() - start)
        raw = Path(place) / f"raw{frames}"
        folders = sorted((raw / "train" / "run0").iterdir())
        names = [(folder.name, path.name.removesuffix(".mp4")) for folder in folders
                 for path in sorted(folder.glob("*.mp4"))]
        (out / ".parts" / "records" / "train").mkdir(parents=True)
        for kind in ("images", "labels"):
            (out / "train" / kind).mkdir(parents=True)

        def bare():                                         # the same work without any check
            for sequence, clip in names:
                path = raw / "train" / "run0" / sequence
                for end in ("info", "segm"):
                    masks = prepare_surreal.loadmat(path / f"{clip}_{end}.mat")
                with prepare_surreal.av.open(str(path / f"{clip}.mp4")) as video:
                    for t, frame in enumerate(video.decode(video=0)):
                        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                        image = image.resize((SIZE, SIZE), Image.LANCZOS)
                        image.save(Path(place) / "bare.jpg", quality=95)
                        mask = Image.fromarray(masks[f"segm_{t + 1}"]).resize((SIZE, SIZE))
                        mask.save(Path(place) / "bare.png")

        def ours():
            for sequence, clip in names:
                prepare_surreal.extract(raw / "train" / "run0", out, "train", sequence, clip,
                                        tuple(range(frames)), SIZE, 0.1)

        times = side_by_side({"bare": bare, "ours": ours}, 3, 3)
        poses = np.random.default_rng(0).normal(size=(400, 72)).astype(np.float32)
        walk = np.random.default_rng(1).normal(0, 0.02, (1_600_000, 72)).astype(np.float32)
        simulated = poses[np.arange(1_600_000) // 4000]     # a pose, and a long walk from there
        simulated += walk.reshape(400, 4000, 72).cumsum(1).reshape(-1, 72)
        start = time.perf_counter()
        prepare_surreal.kmeans(simulated, 25, np.random.default_rng(0))
        clustered = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    show("Preparation, 320x240 to 320x320", ["part", "figure"], [
        *([f"rendering clips of {frames} frames on two processes, start included, frames/s",
           f"{rendered[frames]:.1f}"] for frames in sorted(rendered)),
        ["decoding, reading, encoding alone, one core, frames/s",
         f"{len(names) * frames / times['bare']:.0f}"],
        ["preparing: checked, repaired, cropped too, one core, frames/s",
         f"{len(names) * frames / times['ours']:.0f}"],
        ["time of preparing by the bare time", f"{times['ours'] / times['bare']:.2f}"],
        ["1.6 million simulated poses, 25 clusters, seconds", f"{clustered:.1f}"],
        ["peak memory of this process so far, GiB", f"{peak:.1f}"]])


PARTS = {part.__name__: part for part in (networks, batches, gpu, memory, feeding, evaluation,
                                          growth, preparation)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(
        f"{name}: {part.__doc__.splitlines()[0]}" for name, part in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which parts (none: all)")
    parser.add_argument("--only", default="", help="networks, gpu: those with these "
                        "letters in the name")
    parser.add_argument("--data", default="data/standin", help="feeding: a prepared folder; drawn "
                        "bars where it is not there")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"{min(unknown)} is no part: {', '.join(PARTS)}")
    torch.backends.cudnn.benchmark = True                   # as train.py on a GPU
    for name in options.parts or PARTS:
        PARTS[name](options)


if __name__ == "__main__":
    main()
