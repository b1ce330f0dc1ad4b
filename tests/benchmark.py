"""Measures what the README's section "Speed" says. Run by a person; pytest does not collect it.

    python tests/benchmark.py [networks] [onnx] [reading] [prepare]     none: all, some 15 minutes

What is compared takes turns in one process, since the speed of a shared machine drifts. On a GPU
batches are the paper's, and the card's own rate of bf16 matrix products is the measure.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate                                             # noqa: E402
import tiny                                                 # noqa: E402
import train                                                # noqa: E402

SIZE = 320
NETWORKS = [    # name, options, batch on a CPU; None: only a GPU is fast enough
    ("icnet", {}, 8), ("icnet", dict(width=2), 8), ("segnet", {}, 2), ("segnet", dict(width=2), 1),
    ("hourglass", dict(stem_stride=4), 2), ("hourglass", {}, None)]
CLASSES = dict(names=list(range(25)), pixels=[1] * 25, mean=[0.5] * 3, std=[0.25] * 3)


def side_by_side(ways, seconds=4):
    """Median seconds of each of `ways` {name: function}, which take turns, twice at least."""
    times = {name: [] for name in ways}
    for function in ways.values():                          # the first call allocates and compiles
        function()
    began = time.perf_counter()
    while min(map(len, times.values())) < 2 or time.perf_counter() - began < seconds:
        for name, function in ways.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# ---- The networks

def build(model, options, batch, device, precision, ours, compiled=False):
    """(inference, training step). Plain is float32, NCHW and eager; ours is as in train.py."""
    network = evaluate.MODELS[model](**options)
    layout = torch.contiguous_format
    criterion = tiny.criterion
    if ours:
        layout = evaluate.layout(network, device, precision)
        criterion = train.Criterion(CLASSES, device=device)
    network.to(device, memory_format=layout)
    images = torch.randint(256, (batch, 3, SIZE, SIZE), device=device, dtype=torch.uint8)
    normalised = evaluate.normalise(images, CLASSES, layout)
    labels = torch.randint(25, (batch, SIZE, SIZE), device=device, dtype=torch.uint8)
    optimizer = getattr(torch.optim, network.recipe["optimizer"])(network.parameters(), lr=1e-5)
    known = dict(classes=CLASSES, settings={}, logit_weights=None)
    predict = evaluate.Predictor(known, network, device, precision)
    if compiled:
        network.compile()

    def infer():
        network.eval()
        with torch.no_grad():
            if ours:
                prediction, _ = predict(images, (SIZE, SIZE))
            else:
                prediction = network(normalised).argmax(1)
        prediction[0, 0, 0].item()                          # waits for a GPU

    def step():
        network.train()
        with evaluate.autocast(device, precision if ours else "fp32"):
            outputs = network(normalised)
        total, _ = network.loss(outputs, dict(labels=labels), criterion)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        total.item()

    return infer, step


def flops(step):
    """Floating-point operations of a training step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak(step):
    """Bytes of the GPU that a training step needs at most, with its network."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def networks(options):
    """Images/s of the networks, plain and ours; on a GPU also compiled, its memory and its use,
    and the hours of the paper's steps, bound by compute or by reading."""
    device, precision = evaluate.pick_device()
    cuda = device.type == "cuda"
    where = f"CPU, {torch.get_num_threads()} threads"
    if cuda:
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rate = 2 * 8192 ** 3 / side_by_side({"": lambda: (a @ a)[0, 0].item()})[""]
        where = f"{torch.cuda.get_device_name()}, {rate / 1e12:.0f} TFLOP/s in a matrix product"
    reading_rate = read_rate(SIZE, evaluate.reader_count(None, device))
    rows = []
    for model, kwargs, batch in NETWORKS:
        name = " ".join([model, *(f"{key} {value}" for key, value in kwargs.items())])
        recipe = evaluate.MODELS[model].recipe
        if cuda:
            batch = recipe["batch_size"]
        if options.only not in name or not batch:
            continue
        ways = {"plain": build(model, kwargs, batch, device, precision, ours=False)}
        ways["ours"] = build(model, kwargs, batch, device, precision, ours=True)
        if cuda:
            ways["compiled"] = build(model, kwargs, batch, device, precision, True, compiled=True)
        row = {"network": name, "batch": batch}
        for index, work in enumerate(("inference", "training")):
            seconds = side_by_side({way: pair[index] for way, pair in ways.items()})
            for way, value in seconds.items():
                row[f"{work}: {way}"] = f"{batch / value:.2f}"
            row[f"{work}: ratio"] = f"**{seconds['plain'] / seconds['ours']:.1f}**"
        images = recipe["iterations"] * recipe["batch_size"]
        fastest = min(seconds.values())
        row["hours: compute"] = f"{images * fastest / batch / 3600:.1f}"
        row["hours: reading"] = f"{images / reading_rate / 3600:.1f}"
        if cuda:
            row["share of the matrix rate"] = f"{flops(ways['plain'][1]) / fastest / rate:.0%}"
            step = ways["ours"][1]
            ways.clear()                                    # frees the others before it counts
            row["peak GiB"] = f"{peak(step) / 2 ** 30:.1f}"
        rows.append(row)
    table = evaluate.markdown([rows[0], *(row.values() for row in rows)])
    print(f"\n### Networks at {SIZE}x{SIZE}, images/s: plain (float32, NCHW), ours ({precision}), "
          f"{where}\n\n{table}")


def onnx(options):
    """Images/s of eight pictures in float32: ours, as evaluate.py takes them, and ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        print("\n### ONNX Runtime is not installed: pip install onnx onnxscript onnxruntime")
        return
    rows = [["network", "ours, fp32", f"ONNX Runtime {onnxruntime.__version__}", "ratio"]]
    cpu = torch.device("cpu")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    for model, kwargs in ("icnet", {}), ("segnet", {}), (
            "hourglass", dict(stacks=1, features=128, stem_stride=4)):
        network = evaluate.MODELS[model](**kwargs).eval()
        images = torch.randint(256, (8, 3, SIZE, SIZE), dtype=torch.uint8)
        normalised = evaluate.normalise(images, CLASSES, torch.contiguous_format)
        with tempfile.TemporaryDirectory() as folder:
            torch.onnx.export(network, (normalised,), f"{folder}/x.onnx", dynamo=True,
                              verbose=False)
            session = onnxruntime.InferenceSession(f"{folder}/x.onnx", settings)
        name = session.get_inputs()[0].name
        known = dict(classes=CLASSES, settings={}, logit_weights=None)
        evaluate.fold_batch_norms(network)                  # as evaluate.py does, and the runtime
        predict = evaluate.Predictor(known, network, cpu, "fp32")

        def runtime():
            normalised = evaluate.normalise(images, CLASSES, torch.contiguous_format)
            logits, = session.run(None, {name: normalised.numpy()})
            torch.from_numpy(logits).max(1)

        def ours():
            for pair in images.split(2):
                predict(pair, (SIZE, SIZE))

        seconds = side_by_side(dict(ours=ours, runtime=runtime), 8)
        rows.append([model, *(f"{8 / value:.1f}" for value in seconds.values()),
                     f"**{seconds['runtime'] / seconds['ours']:.2f}**"])
    print(f"\n### Batches of 8 at {SIZE}x{SIZE}, images/s, {torch.get_num_threads()} threads\n\n"
          f"{evaluate.markdown(rows)}")


# ---- Reading and preparation

def read_rate(size, workers, count=400):
    """Images/s that the readers alone deliver, of 320 x 320 JPEGs and their labels."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_prepared(folder, frames=count, size=SIZE, splits=["train"], joints=False)
        split = evaluate.Split(folder, "train", evaluate.read_classes(folder), size,
                               labels_at_size=True)
        chunks = np.arange(count).reshape(-1, 8).tolist()
        batches = evaluate.reader(split, chunks, workers, torch.device("cpu"), persistent=workers)
        list(batches)                                       # the processes have started
        start = time.perf_counter()
        list(batches)
        return count / (time.perf_counter() - start)


def reading(options):
    """Images/s of reading alone, for 1, 2 and all cores."""
    rows = [["side", *(f"{workers} workers" for workers in (1, 2, os.cpu_count()))]]
    for size in SIZE, 96:
        rows.append([size, *(f"{read_rate(size, workers):.0f}"
                             for workers in (1, 2, os.cpu_count()))])
    print(f"\n### Reading 320 x 320 JPEGs and labels, images/s\n\n{evaluate.markdown(rows)}")


POSES = """
import time, numpy as np, prepare_surreal
rng = np.random.default_rng(0)
poses = rng.normal(0, 0.01, (1_600_000, 72)).astype(np.float32)
for walk in poses.reshape(400, 4000, 72):       # a pose, and a long walk from there
    walk[0] = rng.normal(0, 0.5, 72)
    np.cumsum(walk, axis=0, out=walk)
start = time.perf_counter()
prepare_surreal.pick(poses, 90_000, "spread", 25, rng)
memory = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(f"{time.perf_counter() - start:.1f}, {int(memory) / 2 ** 20:.2f}")
"""


def timed(*argv):
    """Seconds that a Python program takes, and what it prints."""
    start = time.perf_counter()
    printed = subprocess.check_output([sys.executable, *argv], cwd=ROOT, text=True).strip()
    return time.perf_counter() - start, printed


def prepare(options):
    """Rendering the stand-in, preparing clips, and choosing from 1.6 million poses."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--workers", str(options.workers), "--out"]
        both, _ = timed("prepare_surreal.py", "--synthesize", "--clips", "20", "--frames", "20",
                        *common, f"{folder}/one")
        alone, _ = timed("prepare_surreal.py", "--raw", f"{folder}/one-raw", *common,
                         f"{folder}/two")
        rendered = 20 * len(list(Path(folder, "one-raw").rglob("*.mp4")))
        prepared = len(list(Path(folder, "two").rglob("images/*.jpg"))) / 20
    print(f"\n### Preparation, {options.workers} workers, starts included\n\n" + evaluate.markdown([
        ["part", "figure"], ["stand-in rendered, frames/s", f"{rendered / (both - alone):.1f}"],
        ["prepared, clips of 20 frames/s", f"{prepared / alone:.2f}"],
        ["90,000 of 1.6 million poses chosen: seconds, GiB", timed("-c", POSES)[1]]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["networks", "onnx", "reading", "prepare"],
                        help="which")
    parser.add_argument("--only", default="", help="networks whose name has these letters")
    parser.add_argument("--workers", type=int, default=2, help="prepare: processes")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True                   # as train.py on a GPU
    for part in arguments.parts:
        globals()[part](arguments)
