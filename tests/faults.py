"""Breaks things on purpose and prints what was tried and what held: README, "What is promised".

`python tests/faults.py` tries everything, `python tests/faults.py kills options` some of it.
"""
import contextlib
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch                    # noqa: E402
import evaluate                 # noqa: E402
import prepare_surreal          # noqa: E402
import train                    # noqa: E402
from test_train import command, same_end, started   # noqa: E402
from tiny import write_prepared                     # noqa: E402

TALLY = {}


def tally(what, held, detail):
    tried, good = TALLY.get(what, (0, 0))
    TALLY[what] = tried + 1, good + bool(held)
    print("" if held else f"FAILED  {what}: {detail}\n", end="", flush=True)


def spawn(argv, program="train.py"):
    """A program in a process group of its own."""
    argv = [sys.executable, program, *argv]
    return subprocess.Popen([str(word) for word in argv], cwd=REPOSITORY, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """(exit status, stderr); a process that does not end in time raises."""
    errors = process.communicate(timeout=600)[1]
    return process.returncode, errors


def call(function, argv):
    """(exit status, stderr) of a program within this process."""
    errors, printed = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    status = None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        try:
            evaluate.run_command("program", lambda: function([str(word) for word in argv]))
        except SystemExit as stop:
            status = stop.code
        except Exception as error:      # a user would see a traceback
            return "traceback", repr(error)
    errors.seek(0)
    return status, errors.read()


def one_sentence(status, errors, *words):
    return status == 2 and len(errors.strip().splitlines()) == 1 and all(
        str(word) in errors for word in words)


def kills(place, data, rng):
    more = "--augment --weighting w1-direct --bn-after 30 --workers 1 --resume"
    argv = [command(data, place / run, more, iterations=60) for run in ("whole", "cut")]
    finish(spawn(argv[0]))
    status, count = None, 0
    while count < 20 or status != 0:
        process = spawn(argv[1])
        if count % 4:
            process.stdout.readline()                       # it has begun
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3 * rng.random() if count < 20 else 600)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            count += 1
        status, errors = finish(process)
        tally("kill -9 at a random moment, the same command again: goes on",
              status in (0, -signal.SIGKILL), errors)
        if status == 0:                                     # if too early, it is done once more
            tally("after the kills: weights, rows and best of an undisturbed run",
                  same_end(place / "whole", place / "cut"), "")
            shutil.rmtree(place / "cut")


def disks(place, data, rng):
    run, again = place / "disk" / "run", ["--resume", place / "disk" / "run", "--iterations", "20"]
    run.parent.mkdir()
    finish(spawn(command(data, place / "whole", iterations=20)))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "x", run.parent]).returncode:
        print("disks: nothing can be mounted here, so a full disk is not tried")
    else:
        for left in (0, 20_000, 200_000):                   # bytes that can still be written
            finish(spawn(command(data, run, iterations=10)))
            before, free = (run / "last.pt").read_bytes(), os.statvfs(run)
            (run / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize - left))
            status, errors = finish(spawn(again))
            held = one_sentence(status, errors) and (run / "last.pt").read_bytes() == before
            (run / "filler").unlink()
            held = held and finish(spawn(again))[0] == 0 and same_end(place / "whole", run)
            tally("a full disk: one sentence, last.pt whole, then the same end", held, errors)
            shutil.rmtree(run)
        subprocess.run(["umount", run.parent])
    process = started(command(data, place / "gone", iterations=10**6))
    shutil.rmtree(place / "gone", ignore_errors=True)
    status, errors = finish(process)
    tally("the run folder is removed: one sentence", one_sentence(status, errors), errors)


class Hostile:
    proof = tempfile.mktemp()           # a folder that whoever loads the pickle makes

    def __reduce__(self):
        return os.mkdir, (self.proof,)


def checkpoints(place, data, rng):
    last = place / "run" / "last.pt"
    call(train.main, command(data, place / "run"))
    whole, good = last.read_bytes(), torch.load(last, weights_only=True)
    for size in [0, 1, len(whole) - 1] + [rng.randrange(len(whole)) for _ in range(40)]:
        last.write_bytes(whole[:size])
        status, errors = call(train.main, ["--resume", place / "run", "--iterations", "6"])
        tally("last.pt cut off at any byte: one sentence",
              one_sentence(status, errors, last), f"at {size}: {status} {errors}")
    contents = [Hostile(), [Hostile()], good | {"weights": good["weights"] | {"x": Hostile()}}]
    for content in contents + [good | {key: Hostile()} for key in good]:
        for form in ("zip", "legacy", "pickle"):
            last.write_bytes(pickle.dumps(content, 2))
            if form != "pickle":
                torch.save(content, last, _use_new_zipfile_serialization=form == "zip")
            for function, argv in (
                    (evaluate.main, ["--ckpt", last]), (train.main, ["--resume", place / "run"]),
                    (train.main, command(data, place / "new", f"--init-from {last}"))):
                status, errors = call(function, argv)
                held = one_sentence(status, errors, last) and not os.path.exists(Hostile.proof)
                tally("a stranger's pickle: nothing runs, one sentence", held, errors)


def options(place, data, rng):
    words = ["", "0", "1", "2", "-1", "3.5", "nan", "1e400", "x", "64", "100", "mirror", "scale",
             "none", "w1-outer", "surreal", "vgg16", "cpu", "cuda:99", "bf16", "../x", "-", "ü"]
    accepted, train.train = [], lambda *_: accepted.append(1)           # options alone are tried
    for module, fixed in ((train, ["--data", "x"]), (evaluate, ["--ckpt", "x"]),
                          (prepare_surreal, ["--raw", "x"])):
        function = module.main
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            function(["--help"])
        known = {word.strip("[],") for word in text.getvalue().split() if word.startswith("[--")}
        known = sorted(known - {"--help", "--synthesize", "--study", "--out", "--ckpt"})
        for number in range(1000):
            argv = [*fixed, "--out", place / str(number)]
            argv += ["--model", rng.choice(sorted(train.MODELS))] if module == train else []
            for option in rng.sample(known, rng.randrange(1, 4)):
                argv += [option, *rng.choices(words, k=rng.choice((0, 1, 1, 1, 2)))]
            accepted.clear()
            status, errors = call(function, argv)
            tally(f"random options of {module.__name__}.py: parsed, or refused with status 2",
                  accepted or status == 2, f"{argv}: {status} {errors}")


NUMBERS = {
    train: "size width stacks features iterations batch-size lr val-every val-images bn-after seed "
           "workers",
    evaluate: "workers",
    prepare_surreal: "size workers train val test clusters margin seed"}
NONSENSE = ["", "x", "nan", "inf", "-1", "-0.5", "1e400"]


def nonsense(place, data, rng):
    """Numbers that no option can mean: to accept one is a failure."""
    accepted, train.train = [], lambda *_: accepted.append(1)
    fixed = {train: ["--model", "hourglass", "--data", data], evaluate: ["--ckpt", place / "x"],
             prepare_surreal: ["--raw", place / "x"]}
    for module, names in NUMBERS.items():
        for name in names.split():
            for word in NONSENSE:
                accepted.clear()
                argv = [*fixed[module], "--out", place / "out", f"--{name}", word]
                status, errors = call(module.main, argv)
                refused = not accepted and status == 2 and f"--{name}" in errors
                tally(f"nonsense for a number of {module.__name__}.py: refused by name",
                      refused, f"--{name} {word!r}: {status} {errors}")


if __name__ == "__main__":
    for part in (kills, disks, checkpoints, options, nonsense):
        if part.__name__ in sys.argv[1:] or not sys.argv[1:]:
            began = time.time()
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder), write_prepared(Path(folder) / "data"), random.Random(0))
            print(f"{part.__name__}: {time.time() - began:.0f} s", flush=True)
    print(evaluate.markdown([["what was tried", "times", "held"]] + [
        [what, *counts] for what, counts in TALLY.items()]))
    sys.exit(any(tried > good for tried, good in TALLY.values()))
