"""Breaks things on purpose, and prints what was tried and what held: the README's "Reliability".

    python tests/faults.py                      everything, about ten minutes on two cores
    python tests/faults.py kills strangers      some of it; --help lists the parts
    python tests/faults.py --seed 3             other random moments, bits and options

Not collected by pytest, whose tests hold one quick case of each. Exit status 1 if anything failed.
"""
import argparse
import contextlib
import copy
import ctypes
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csc_matrix

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import evaluate                                             # noqa: E402
import prepare_surreal                                      # noqa: E402
import train                                                # noqa: E402
from tiny import write_prepared                             # noqa: E402

TIMED = ("images_per_s", "data_wait")                       # columns of log.csv that may differ


class Tally:
    """Counts what was tried and what held; prints what did not at once."""

    def __init__(self):
        self.rows = {}

    def __call__(self, what, held, detail=""):
        tried, good = self.rows.get(what, (0, 0))
        self.rows[what] = tried + 1, good + bool(held)
        if not held:
            print(f"FAILED  {what}: {detail}", flush=True)

    def show(self):
        print("\n" + evaluate.markdown([["what was tried", "times", "held"]] + [
            [what, tried, good] for what, (tried, good) in self.rows.items()]))
        return all(tried == good for tried, good in self.rows.values())


def command(data, out, *more, iterations=40):
    return ["--model", "segnet", "--data", str(data), "--out", str(out), "--width", "0.25",
            "--iterations", str(iterations), "--batch-size", "4", "--val-every", "2",
            "--val-images", "4", "--workers", "0", "--precision", "fp32", *more]


def start(argv, program=None, **settings):
    """train.py (or a program text) in a process of its own, in a process group of its own."""
    begin = [sys.executable, *(["-c", program] if program else ["train.py"])]
    return subprocess.Popen([*begin, *argv], cwd=REPOSITORY, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"),
                            **settings)


def finish(process, seconds=180):
    """(exit status, stderr); kills what does not end."""
    try:
        errors = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, "did not end: " + process.communicate()[1]
    return process.returncode, errors


def wait_until(condition, process, seconds=60):
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    return condition()


def quietly(function, argv):
    """(exit status, stderr) of a main function in this process; a traceback is its own status."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = function(argv)
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:                      # what the user would see a traceback of
            return f"traceback {type(error).__name__}", str(error)
    return status, errors.getvalue()


def one_sentence(status, errors, *words):
    lines = [line for line in errors.strip().splitlines() if "it/s]" not in line]
    return status == 2 and len(lines) == 1 and all(str(word) in errors for word in words)


def same_end(one, other):
    """Whether two finished runs have equal weights, best checkpoints and logs, bit for bit."""
    for name in ("last.pt", "best.pt"):
        a, b = (evaluate.load_checkpoint(Path(run) / name)["weights"] for run in (one, other))
        if not all(torch.equal(a[key], b[key]) for key in a):
            return False
    logs = [[{key: value for key, value in row.items() if key not in TIMED}
             for row in train.read_log(Path(run) / "log.csv")] for run in (one, other)]
    return logs[0] == logs[1] and len(logs[0]) > 0


# -------------------------------------------------------------------------- the run itself

def kills(place, rng, tally):
    """kill -9 at random moments and at the worst ones; the end is that of an undisturbed run."""
    data = write_prepared(place / "data")
    more = ["--augment", "--weighting", "w1-direct", "--bn-after", "30", "--workers", "1"]
    argv, cut = command(data, place / "cut", *more, iterations=120), place / "cut"
    finish(start(command(data, place / "whole", *more, iterations=120)))
    count = 0
    while count < 20:
        process = start(["--resume", str(cut)] if (cut / "config.json").exists() else argv)
        process.stdout.readline()                           # it has begun, or goes on
        time.sleep(rng.random() * 0.8)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            count += 1
        elif process.returncode == 0:                       # it came to its end: all over again
            shutil.rmtree(cut)
            count = 0
        status, errors = finish(process)
        if status not in (0, -signal.SIGKILL):
            return tally("kill -9 at a random moment, then resumed", False, errors)
        for name in ("last.pt", "best.pt"):                 # whole, or not there
            if (cut / name).exists():
                evaluate.load_checkpoint(cut / name)
        if status == -signal.SIGKILL:
            tally("kill -9 at a random moment: checkpoints whole", True)
    status, errors = finish(start(["--resume", str(cut)]))
    tally(f"after {count} kills: weights, best and log bit for bit those of an undisturbed run",
          status == 0 and same_end(place / "whole", cut), errors)

    program = """
import os, signal, sys
sys.path.insert(0, "tests")
import evaluate, train
kind, number = sys.argv[1], int(sys.argv[2])
class Ends:
    def __init__(self, function, before):
        self.function, self.before, self.calls = function, before, 0
    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == number and self.before: os.kill(os.getpid(), signal.SIGKILL)
        result = self.function(*args, **kwargs)
        if self.calls == number: os.kill(os.getpid(), signal.SIGKILL)
        return result
if kind in ("before", "after"): os.replace = Ends(os.replace, kind == "before")
if kind == "validating": evaluate.confusion_matrices = Ends(evaluate.confusion_matrices, True)
if kind == "flushing": os.fsync = Ends(os.fsync, True)
sys.exit(train.main(sys.argv[3:]))
"""
    finish(start(command(data, place / "short", *more, iterations=8)))
    moments = [("before", n) for n in range(1, 12)] + [("after", n) for n in range(1, 12)]
    moments += [("validating", n) for n in (1, 2, 3, 6)] + [("flushing", n) for n in (2, 4, 7)]
    for number, (kind, call) in enumerate(moments):
        run = place / f"moment{number}"
        argv = command(data, run, *more[:-2], iterations=8)
        killed = finish(start([kind, str(call), *argv], program))[0] == -signal.SIGKILL
        begun = (run / "config.json").exists()              # else it was killed before that
        status, errors = finish(start(["--resume", str(run)] if begun else argv))
        same = killed and status == 0 and same_end(place / "short", run)
        tally("kill -9 before, in and after each file that is written, and in validation", same,
              f"{kind} {call}: {errors}")


def signals(place, rng, tally):
    """Ctrl-C and SIGTERM: the step is finished, saved, and the way to go on is printed."""
    data = write_prepared(place / "data")
    finish(start(command(data, place / "whole", "--val-every", "20", iterations=300)))
    for index, (number, code) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)] * 4):
        run = place / f"run{index}"
        process = start(command(data, run, "--workers", str(index // 2 % 2), "--val-every", "20",
                                iterations=300))
        process.stdout.readline()
        time.sleep(rng.random() * 0.5)
        os.killpg(process.pid, number)                      # as a terminal does: workers too
        status, errors = finish(process)
        held = status == code and "python train.py --resume" in errors
        again, more = finish(start(["--resume", str(run)]))
        tally("Ctrl-C or SIGTERM: exit 130 or 143, resumed to the same end",
              held and again == 0 and same_end(place / "whole", run), f"{status} {errors} {more}")
    process = start(command(data, place / "twice", "--val-images", "4000", iterations=10**6))
    wait_until((place / "twice" / "last.pt").exists, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    status, errors = finish(process, 20)
    tally("a second Ctrl-C stops at once", status in (130, -signal.SIGINT), f"{status} {errors}")


def disks(place, rng, tally):
    """A full disk, a folder that must not be written, a folder that is gone."""
    data = write_prepared(place / "data")
    limit = 150_000                                         # bytes a file may have: no last.pt fits

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def mortal():                                           # root may write anywhere, but for this:
        for capability in (1, 2):                           # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)            # PR_CAPBSET_DROP

    finish(start(command(data, place / "whole", iterations=8)))
    for what, hinder in (("a full disk", full), ("a read-only folder", mortal)):
        run = place / what.replace(" ", "-")
        finish(start(command(data, run, iterations=4)))
        before = (run / "last.pt").read_bytes()
        if hinder is mortal:
            run.chmod(0o555)
        status, errors = finish(start(["--resume", str(run), "--iterations", "8"],
                                      preexec_fn=hinder))
        kept = (run / "last.pt").read_bytes() == before and not list(run.glob(".*.tmp"))
        run.chmod(0o755)
        said = status == 1 and "Traceback" not in errors and str(run) in errors
        again, more = finish(start(["--resume", str(run), "--iterations", "8"]))
        tally(f"{what}: said, exit 1, the last good file kept, resumed to the same end",
              said and kept and again == 0 and same_end(place / "whole", run),
              f"{status} {errors} {more}")
    run = place / "removed"
    process = start(command(data, run, iterations=10**6))
    wait_until((run / "last.pt").exists, process)
    shutil.rmtree(run, ignore_errors=True)
    status, errors = finish(process, 30)
    tally("the run folder is removed: said, exit 1", status == 1 and "Traceback" not in errors,
          f"{status} {errors}")


def checkpoints(place, rng, tally):
    """last.pt cut off or garbled anywhere: named, and best.pt offered; never taken for whole."""
    data, run = write_prepared(place / "data"), place / "run"
    assert quietly(train.main, command(data, run, iterations=4))[0] == 0
    whole = (run / "last.pt").read_bytes()
    for index in range(60):
        broken, at = bytearray(whole), rng.randrange(len(whole))
        if index % 2:
            broken = broken[:at]
        else:
            broken[at] ^= 1 << rng.randrange(8)
        (run / "last.pt").write_bytes(broken)
        status, errors = quietly(train.main, ["--resume", str(run), "--iterations", "6"])
        (run / "last.pt").write_bytes(whole)
        harmless = not index % 2 and status == 0            # a bit of padding, or of a date
        if harmless:
            shutil.copy(run / "last.pt", place / "same.pt")
        tally("last.pt cut off at any byte, or with any bit flipped",
              one_sentence(status, errors, "last.pt", "best.pt") or harmless,
              f"{'cut at' if index % 2 else 'bit flipped in'} {at}: {status} {errors}")
        if status == 0:
            shutil.rmtree(run)
            quietly(train.main, command(data, run, iterations=4))


# -------------------------------------------------------------------------- what strangers send

class Runs:
    """Pickled, it makes whoever loads it write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def strangers(place, rng, tally):
    """Checkpoints that would run code, or lie about their content; nothing of them is executed."""
    data, run, proof = write_prepared(place / "data"), place / "run", place / "executed"
    assert quietly(train.main, command(data, run, iterations=2))[0] == 0
    good = torch.load(run / "last.pt", weights_only=True)
    hostile = {f"inside {key}": good | {key: Runs(proof)} for key in good}
    hostile |= {"alone": Runs(proof), "in a list": [Runs(proof)]}
    hostile["in the weights"] = good | {"weights": good["weights"] | {"x": Runs(proof)}}
    for name, content in hostile.items():
        for how in ("zip", "legacy", "pickle"):
            path = place / "hostile" / "last.pt"
            path.parent.mkdir(exist_ok=True)
            shutil.copy(run / "config.json", path.parent)
            if how == "pickle":
                path.write_bytes(pickle.dumps(content))
            else:
                torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
            for way in (lambda: quietly(evaluate.main, ["--ckpt", str(path)]),
                        lambda: quietly(train.main, command(data, place / "new", "--init-from",
                                                            str(path))),
                        lambda: quietly(train.main, ["--resume", str(path.parent),
                                                     "--iterations", "4"])):
                status, errors = way()
                tally("a checkpoint with a pickle that would run code, read in three ways",
                      one_sentence(status, errors, path) and not proof.exists(),
                      f"{name}, {how}: {status} {errors}")
                proof.unlink(missing_ok=True)
    wrong = [0, -1, 10**12, 2.5, float("nan"), "x", "", None, True, [], [1], {}, {"a": 1},
             torch.zeros(2)]
    path = place / "lies.pt"
    for key in good:
        for value in wrong:
            torch.save(good | {key: value}, path)
            status, errors = quietly(evaluate.main, ["--ckpt", str(path), "--data", str(data),
                                                     "--workers", "0", "--out", str(place / "e")])
            tally("a checkpoint with one entry replaced by nonsense, evaluated",
                  status == 0 or one_sentence(status, errors), f"{key}={value}: {status} {errors}")
    hourglass = ["--stacks", "2", "--features", "16", "--stem-stride", "4", "--width", "1"]
    assert quietly(train.main, command(data, place / "hourglass", "--model", "hourglass",
                                       *hourglass, iterations=2))[0] == 0
    other = torch.load(place / "hourglass" / "last.pt", weights_only=True)
    lies = [checkpoint | {"kwargs": checkpoint["kwargs"] | {key: value}}
            for checkpoint in (good, other) for key in checkpoint["kwargs"] for value in wrong]
    lies += [good | {"settings": good["settings"] | {key: value}} for key in ("data", "size")
             for value in wrong]
    first = next(iter(good["weights"]))
    lies += [good | {"weights": good["weights"] | {first: value}} for value in (
        *wrong, good["weights"][first].to_sparse(), good["weights"][first].double())]
    for number, lie in enumerate(lies):
        torch.save(lie, path)
        given = ["--data", str(data)] if number % 2 else []
        status, errors = quietly(evaluate.main, ["--ckpt", str(path), *given, "--workers", "0",
                                                 "--out", str(place / "e")])
        tally("a checkpoint with one entry replaced by nonsense, evaluated",
              status == 0 or one_sentence(status, errors), f"lie {number}: {status} {errors}")


def descriptions(place, rng, tally):
    """classes.json with any value replaced: one sentence, or it changes nothing that matters."""
    data = write_prepared(place / "data")
    good = json.loads((data / "classes.json").read_text())
    wrong = [0, -1, 255, 10**9, 0.5, "x", "../../x", None, True, [], [1], {}, [None] * 25,
             [[0, 0]] * 25, list(range(24)), [1] * 25, {"g": [99]}, {"g": []}, {"g": "x"}]
    cases = [(key, value) for key in good for value in wrong]
    for key in good:
        if isinstance(good[key], list):
            cases += [(key, good[key][:-1]), (key, good[key] + good[key][:1])]
            cases += [(key, [value, *good[key][1:]]) for value in wrong]
    for key, value in cases:
        changed = copy.deepcopy(good) | {key: value}
        (data / "classes.json").write_text(json.dumps(changed))
        shutil.rmtree(place / "run", ignore_errors=True)
        status, errors = quietly(train.main, command(data, place / "run", "--weighting", "w1-outer",
                                                     "--augment", iterations=1))
        tally("classes.json with one value replaced, trained on",
              status == 0 or one_sentence(status, errors), f"{key}={value}: {status} {errors}")
    text = json.dumps(good).encode()
    for _ in range(60):
        broken = bytearray(text[:rng.randrange(1, len(text) + 1)])
        broken[rng.randrange(len(broken))] = rng.randrange(256)
        (data / "classes.json").write_bytes(broken)
        shutil.rmtree(place / "run", ignore_errors=True)
        status, errors = quietly(train.main, command(data, place / "run", iterations=1))
        tally("classes.json cut off and garbled", status == 0 or one_sentence(status, errors),
              f"{status} {errors}")


# -------------------------------------------------------------------------- the data

def data_faults(place, rng, tally):
    """A bad file in the prepared folder: named, no step with it, and mended, the same end."""
    data = write_prepared(place / "data")
    # not in validation, which would stop earlier: train frames are measured too, but only four
    assert quietly(train.main, command(data, place / "whole", iterations=12))[0] == 0
    first = sorted(path.stem for path in (data / "train" / "images").iterdir())
    chosen = set(np.random.default_rng([2, 0]).permutation(len(first))[:4].tolist())
    frame = next(name for index, name in enumerate(first) if index not in chosen)
    image, label = (data / "train" / kind for kind in (f"images/{frame}.jpg",
                                                       f"labels/{frame}.png"))

    def too_large():
        Image.fromarray(np.full((64, 64), 25, np.uint8)).save(label)

    def other_size():
        Image.fromarray(np.zeros((64, 32), np.uint8)).save(label)

    def huge():                                             # 60,000 x 60,000, says the header
        whole = bytearray(label.read_bytes())
        whole[16:24] = (60000).to_bytes(4, "big") * 2
        whole[29:33] = zlib.crc32(bytes(whole[12:29])).to_bytes(4, "big")
        label.write_bytes(whole)

    faults = {
        "a label above K - 1": (label, too_large), "a label of another size": (label, other_size),
        "an image without label": (label, label.unlink),
        "a zero-byte image": (image, lambda: image.write_bytes(b"")),
        "a zero-byte label": (label, lambda: label.write_bytes(b"")),
        "an image cut off": (image, lambda: image.write_bytes(image.read_bytes()[:300])),
        "a label cut off": (label, lambda: label.write_bytes(label.read_bytes()[:90])),
        "text for an image": (image, lambda: image.write_text("hello")),
        "a header of 60,000 x 60,000": (label, huge)}
    for name, (path, spoil) in faults.items():
        whole, run = path.read_bytes(), place / name.replace(" ", "-").replace(",", "")
        spoil()
        status, errors = quietly(train.main, command(data, run, iterations=12))
        named = one_sentence(status, errors, path)
        kept = (evaluate.load_checkpoint(run / "last.pt")["step"] if (run / "last.pt").exists()
                else 0)
        path.write_bytes(whole)
        again = ["--resume", str(run)] if (run / "config.json").exists() else command(
            data, run, iterations=12)
        status, errors_again = quietly(train.main, again)
        tally("a bad file in the prepared folder: named, and once mended the same end",
              named and kept < 12 and status == 0 and same_end(place / "whole", run),
              f"{name}: {errors} {errors_again}")
    for name, frames, status_wanted, more in (
            ("no validation frames", {"train": 4, "val": 0, "test": 0}, 2, []),
            ("no training frames", {"train": 0, "val": 4, "test": 0}, 2, []),
            ("one image in each split", 1, 0, []),
            ("a batch larger than the set", 3, 0, ["--batch-size", "8"])):
        data = write_prepared(place / f"set {name}", frames=frames)
        status, errors = quietly(train.main, command(data, place / f"run {name}", *more,
                                                     iterations=2))
        tally("tiny and empty splits", status == status_wanted and "Traceback" not in errors,
              f"{name}: {status} {errors}")


def pictures(place, rng, tally):
    """Anybody's pictures, broken in many ways: the others are still done, names stay inside."""
    data, run = write_prepared(place / "data"), place / "run"
    assert quietly(train.main, command(data, run, iterations=2))[0] == 0
    folder, out = place / "in", place / "out"
    folder.mkdir()
    Image.new("RGB", (50, 40), "red").save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    for index in range(40):
        broken, at = bytearray(whole), rng.randrange(len(whole))
        broken = broken[:at] if index % 2 else broken
        if not index % 2:
            broken[at] ^= 1 << rng.randrange(8)
        (folder / f"bad{index}.png").write_bytes(broken)
    for name in ("..png", "a b'c\".png", "ünï.png", "-rf.png", "x\n.png", "%s{0}.png"):
        Image.new("RGB", (9, 7), "blue").save(folder / name, format="PNG")
    before = {path for path in place.rglob("*") if out not in path.parents and path != out}
    status, errors = quietly(evaluate.main, ["--ckpt", str(run), "--images", str(folder), "--out",
                                             str(out)])
    after = {path for path in place.rglob("*") if out not in path.parents and path != out}
    tally("48 pictures, 40 of them damaged: no traceback, nothing written elsewhere",
          status in (0, 1) and before == after, f"{status} {errors} {after - before}")
    tally("48 pictures, 40 of them damaged: the good ones are done",
          (out / "good-overlay.png").exists() and (out / "ünï-labels.png").exists(), errors)


def options(place, rng, tally):
    """Random command lines: one sentence and status 2 before any data is read, or accepted."""
    values = ["", "0", "1", "2", "-1", "3.5", "nan", "inf", "1e400", "x", "64", "100", "mirror",
              "scale", "naive-mirror", "none", "w1-outer", "surreal", "centroids", "basic", "vgg16",
              "cpu", "cuda:99", "bf16", "../x", "\0", "ü", "9" * 30]
    trains = [action.option_strings for action in train.build_parser()._actions
              if action.option_strings and "--help" not in action.option_strings]
    accepted, real = [], train.train
    train.train = lambda *arguments, **more: accepted.append(1)
    try:
        for _ in range(3000):
            argv = ["--model", rng.choice(["icnet", "segnet", "hourglass"])]
            for option in rng.sample(trains, rng.randrange(1, 4)):
                argv += [rng.choice(option), *rng.choices(values, k=rng.choice((0, 1, 1, 1, 2)))]
            if "--study" in argv:
                continue
            accepted.clear()
            argv += ["--out", str(place / "none"), "--data", str(place / "none")]
            status, errors = quietly(train.main, argv)
            tally("a random command line of train.py: accepted, or one sentence and status 2",
                  (status in (0, None) and accepted) or one_sentence(status, errors),
                  f"{argv}: {status} {errors}")
    finally:
        train.train = real
    for program, main, required in (
            ("evaluate.py", evaluate.main, ["--ckpt", str(place / "none.pt")]),
            ("prepare_surreal.py", prepare_surreal.main,
             ["--raw", str(place / "none"), "--out", str(place / "out")])):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main(["--help"])
        names = sorted({word.strip("[],") for word in text.getvalue().split()
                        if word.strip("[],").startswith("--")} - {"--help", "--out", "--synthesize",
                                                                  "--clips", "--raw", "--json"})
        for _ in range(500):
            argv = list(required)
            for option in rng.sample(names, rng.randrange(1, 3)):
                argv += [option, *rng.choices(values, k=rng.choice((0, 1, 1, 2)))]
            status, errors = quietly(main, argv)
            tally(f"a random command line of {program}: one sentence and status 2",
                  one_sentence(status, errors), f"{argv}: {status} {errors}")


def preparation(place, rng, tally):
    """Raw clips with flipped bits, bytes cut off, fields missing or of wrong shape and type."""
    seeds = place / "seeds"
    prepare_surreal.synthesize(seeds, 2, 3, rng.randrange(10**6), workers=2)
    good = sorted((seeds / "train" / "run0").rglob("*.mp4"))[0]
    name, raw = good.stem, place / "raw" / "cmu"
    parts = {part: good.with_name(name + part) for part in prepare_surreal.PARTS}

    def put(split, sequence, clip, changed):
        folder = raw / split / "run0" / sequence
        folder.mkdir(parents=True, exist_ok=True)
        for part, source in parts.items():
            content = changed.get(part, source.read_bytes())
            if content is not None:
                (folder / f"{clip}{part}").write_bytes(content)

    whole, names = {part: path.read_bytes() for part, path in parts.items()}, []
    for index, odd in enumerate(("01_01", "a b", "quote'\"", "ünï-文", "..x", "-rf", "%s{0}")):
        names.append(f"{odd}_c{index + 1:04d}")
        put("train", odd, names[-1], {})
    fields = {part: {key: value for key, value in prepare_surreal.loadmat(parts[part]).items()
                     if not key.startswith("__")} for part in ("_segm.mat", "_info.mat")}
    count = 0

    def bad(changed):
        nonlocal count
        count += 1
        put("train", "99_01", f"99_01_c{count:04d}", changed)

    for part in prepare_surreal.PARTS:
        for index in range(20):
            broken, at = bytearray(whole[part]), rng.randrange(len(whole[part]))
            if index % 2:
                broken = broken[:at]
            else:
                for _ in range(1 + index // 4):
                    broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            bad({part: bytes(broken)})
        bad({part: None})
        bad({part: b""})
    replacements = [np.zeros(0), np.zeros((2, 2)), np.full((3, 24, 3), np.nan), np.array("text"),
                    np.zeros((240, 320, 2)), np.full((240, 320), 77, np.uint8),
                    np.array([[{"a": 1}]], object), np.zeros((2, 24, 9)), np.array(1j),
                    csc_matrix(np.ones((2, 24))), csc_matrix(np.ones((3, 24))),
                    csc_matrix(np.ones((240, 320), bool))]
    for part in fields:
        for key in ("segm_1", "segm_3") if part == "_segm.mat" else ("joints2D", "joints3D"):
            bad({part: prepare_surreal.matlab_file(
                {k: v for k, v in fields[part].items() if k != key})})
            for value in replacements:
                bad({part: prepare_surreal.matlab_file(fields[part] | {key: value})})
    put("val", "77_01", "77_01_c0001", {})
    put("test", "78_01", "78_01_c0001", {})
    out = place / "prepared"
    status, errors = quietly(prepare_surreal.main, ["--raw", str(raw), "--out", str(out), "--size",
                                                    "64", "--workers", "2"])
    tally("the preparation ends well", status == 0, f"{status} {errors[-300:]}")
    found = {path.stem for path in (out / "train" / "images").glob("*.jpg")}
    for clip in names:
        tally("a good clip of an odd name among them: all frames come out",
              all(f"{clip}_{t:03d}" in found for t in (1, 2, 3)), clip)
    text = (out / "skipped.csv").read_text(errors="surrogateescape")
    for index in range(count):
        clip = f"99_01_c{index + 1:04d}"
        kept = [f"{clip}_{t:03d}" for t in (1, 2, 3) if f"{clip}_{t:03d}" in found]
        tally("a spoilt raw clip: its frames come out or are listed in skipped.csv",
              len(kept) == 3 or clip in text, clip)
    inside = all(out in path.resolve().parents for path in out.rglob("*"))
    tally("no name leads outside the output folder", inside)


# -------------------------------------------------------------------------- processes

def children(pid):
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in text.stdout.split()]


def workers(place, rng, tally):
    """A data worker or one of several training processes dies: a message within seconds."""
    data = write_prepared(place / "data")
    for index in range(3):
        run, before = place / f"run{index}", set(os.listdir("/dev/shm"))
        process = start(command(data, run, "--workers", "2", iterations=10**6))
        wait_until((run / "last.pt").exists, process)
        time.sleep(rng.random() * 0.5)
        victims = wait_until(lambda: children(process.pid), process) and children(process.pid)
        began = time.time()
        os.kill(rng.choice(victims), signal.SIGKILL)
        status, errors = finish(process, 30)
        evaluate.load_checkpoint(run / "last.pt")
        left = set(os.listdir("/dev/shm")) - before
        try:
            os.killpg(process.pid, 0)
            left.add("processes")
        except ProcessLookupError:
            pass
        tally("a data worker is killed: said within 10 seconds, nothing left behind",
              status == 1 and "worker died" in errors and time.time() - began < 10 and not left,
              f"{status} {errors} {left}")
    run = place / "several"
    program = "from torch.distributed.run import main; main()"
    process = start(["--nproc_per_node=2", "--master_port=29617", "train.py",
                     *command(data, run, "--bn-after", "99999999", iterations=10**6)], program)
    wait_until((run / "last.pt").exists, process, 120)
    victims = children(process.pid)
    began = time.time()
    os.kill(rng.choice(victims), signal.SIGKILL)
    status, errors = finish(process, 60)
    tally("one of two torchrun processes is killed: the other ends too, within 60 seconds",
          status not in (0, None) and time.time() - began < 60, f"{status} {errors[-500:]}")


PARTS = {part.__name__: part for part in (
    kills, signals, disks, checkpoints, strangers, descriptions, data_faults, pictures, options,
    preparation, workers)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog="\n".join(
        f"{name}: {part.__doc__.splitlines()[0]}" for name, part in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which parts (none: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, bits and options")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"{min(unknown)} is no part: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    tally = Tally()
    for name in args.parts or PARTS:
        began = time.time()
        with tempfile.TemporaryDirectory() as place:
            PARTS[name](Path(place), random.Random(f"{args.seed} {name}"), tally)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)
    return 0 if tally.show() else 1


if __name__ == "__main__":
    sys.exit(main())
