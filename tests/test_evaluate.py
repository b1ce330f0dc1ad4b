"""evaluate.py: its figures against hand-worked ones, the paper's and NumPy's; strange files."""
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import tiny
import train
from evaluate import Predictor, Problem, SegNet, Split, read_classes, scores

CPU = torch.device("cpu")
NAMES = tiny.NAMES[:5]
KWARGS = dict(num_classes=5, width=0.0625)
TURNED = Image.Exif()
TURNED[0x0112] = 6      # to be shown a quarter turn clockwise
GOOD = np.array([[0, 1], [2, 255]], np.uint8).repeat(16, 0).repeat(16, 1)   # a label
matrices = lambda right: torch.tensor([[[r, 1000 - r], [0, 1000]] for r in right])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), 7, names=NAMES, groups={})


def save(path, data, seed, weights=None):
    torch.manual_seed(seed)
    return tiny.write_checkpoint(path, SegNet(**KWARGS), "segnet", data, weights, kwargs=KWARGS)


@pytest.fixture
def run(tmp_path, data):
    return save(tmp_path / "runs" / "first" / "best.pt", data, seed=0)


def report(names, mirror, confusion, **groups):
    """report_text of one image, (1, K, K)."""
    return evaluate.report_text([dict(
        name="net", confusions=confusion, split=SimpleNamespace(
            frames=["a_001"], clips=["a"], folder="test", size=64),
        classes=dict(names=names, mirror=mirror, groups=groups or tiny.GROUPS, source="own"))])


def command(capsys, *argv):
    """Exit status, printed text and complaint of evaluate.py, which is one sentence at most."""
    with pytest.raises(SystemExit) as end:
        evaluate.run_command("evaluate.py", lambda: evaluate.main([str(word) for word in argv]))
    printed, complaint = capsys.readouterr()
    assert complaint.count("\n") == (end.value.code == 2) and "Traceback" not in complaint
    return end.value.code, printed, complaint


# ---- Recipes

@pytest.mark.parametrize("model, batch, optimizer, arguments, decay, iterations, rates", [
    ("icnet", 64, "SGD", {"momentum": 0.9}, 1e-4, 40000,
     {0: 0.0025, 20000: 0.01 * 0.5 ** 0.9, 39999: 0.01 * 40000 ** -0.9}),
    ("segnet", 32, "Adam", {}, 0, 40000, {0: 0.0025, 20000: 0.01, 39999: 0.01}),
    ("hourglass", 3, "RMSprop", {}, 0, 150000,
     {1: 1.25e-4, 1999: 2.5e-4, 2000: 2.4e-4, 3999: 2.4e-4, 4000: 2.304e-4})])
def test_recipes_are_the_papers(model, batch, optimizer, arguments, decay, iterations, rates):
    args = train.parse(["--model", model, "--double-filters"])[0]
    args.warmup = 4
    assert (args.batch_size, args.optimizer, args.optimizer_args) == (batch, optimizer, arguments)
    assert (args.weight_decay, args.iterations, args.width) == (decay, iterations, 2)
    assert {step: train.learning_rate(args, step) for step in rates} == pytest.approx(rates)


# ---- Metrics

def test_figures_of_a_matrix_worked_by_hand():
    result = scores([[5, 1, 0], [2, 3, 1], [0, 0, 4]])
    expected = dict(
        iou=[5 / 8, 3 / 7, 4 / 5], class_f1=[10 / 13, 6 / 10, 8 / 9], recall=[5 / 6, 3 / 6, 1],
        class_precision=[5 / 7, 3 / 4, 4 / 5], miou=(5 / 8 + 3 / 7 + 4 / 5) / 3, accuracy=12 / 16,
        f1=(10 / 13 + 6 / 10 + 8 / 9) / 3, class_accuracy=(5 / 6 + 3 / 6 + 1) / 3, body_f1=16 / 19)
    assert result.keys() == expected.keys() >= evaluate.FIGURES.keys()
    assert all(result[key] == pytest.approx(value) for key, value in expected.items())


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_absent_classes_are_skipped_not_scored():
    missed = scores([[8, 0, 0], [0, 0, 0], [2, 0, 0]])      # 1 occurs nowhere, 2 is missed
    predicted = scores([[8, 2, 0], [0, 0, 0], [0, 0, 0]])   # 1 is predicted, and never true
    same = lambda values, expected: np.allclose(values, expected, equal_nan=True)
    assert same(missed["iou"], [0.8, np.nan, 0]) and same(predicted["iou"], [0.8, 0, np.nan])
    assert (missed["miou"], missed["class_accuracy"]) == pytest.approx((0.4, 0.5))
    assert same(missed["class_precision"], [0.8, np.nan, np.nan])
    assert same(predicted["recall"], [0.8, np.nan, np.nan])
    assert all(np.isnan(scores(np.zeros((3, 3)))[key]) for key in evaluate.FIGURES)


def test_counts_agree_with_numpy_pixel_by_pixel():
    rng, K = np.random.default_rng(1), 25
    labels, prediction = rng.integers(0, K, (2, 3, 40, 30))
    labels[rng.random(labels.shape) < 0.2] = 255
    counted = evaluate.confusion_matrices(torch.tensor(prediction),
                                          torch.tensor(labels, dtype=torch.uint8), K)
    expected = np.zeros((3, K, K), int)
    for image, *pixel in np.argwhere(labels != 255):
        expected[image, labels[image, *pixel], prediction[image, *pixel]] += 1
    assert counted.dtype == torch.int64 and (counted.numpy() == expected).all()


@pytest.mark.parametrize("columns, mean", [        # Table 2, ICNet normal; Table 5, SegNet doubled
    ((98.9, 84.9, 74.78, 64.3, 53.8, 64.0, 54.2, 52.7, 39.5, 32.3, 19.8, 9.3, 9.5), 48.7),
    ((99.1, 84.2, 70.9, 63.2, 58.4, 58.1, 51.8, 52.7, 43.9, 39.9, 28.8, 12.4, 9.8), 49.9)])
def test_the_papers_all_classes_column_is_the_mean_over_25(columns, mean):
    confusion = np.zeros((25, 25))
    for accuracy, ids in zip(columns, tiny.GROUPS.values()):
        confusion[ids, ids] = 100 * accuracy
        confusion[ids, np.array(ids) - 1] = 10000 - 100 * accuracy     # goes to another class
    text = report(tiny.NAMES, tiny.MIRROR, torch.tensor(confusion)[None].long())
    for column, accuracy in zip(tiny.GROUPS, columns):
        assert f"{accuracy:.1f}" in re.search(rf"accuracy: {column} .*", text)[0]
    assert 100 * scores(confusion)["class_accuracy"] == pytest.approx(mean, abs=0.05)


def test_intervals_are_over_clips_not_frames():
    right = np.random.default_rng(3).integers(200, 900, 20)
    clips = [f"c{clip:02d}" for clip in range(20) for t in range(10)]
    repeated = matrices(right.repeat(10))           # ten equal frames a clip hold no more than one
    half = evaluate.bootstrap(repeated, clips)["accuracy"]
    assert half == pytest.approx(evaluate.bootstrap(matrices(right), clips[::10])["accuracy"])
    assert half == pytest.approx(1.96 * ((right + 1000) / 2000).std() / 20 ** 0.5, rel=0.15)
    assert half > 2 * evaluate.bootstrap(repeated, [f"{i:03d}" for i in range(200)])["accuracy"] > 0
    assert np.isnan(evaluate.bootstrap(repeated, ["c"] * 200)["miou"])


def test_paired_difference_sees_what_two_intervals_hide():
    right = np.random.default_rng(4).integers(200, 900, 20)
    frames, one, other = [f"c{clip}" for clip in range(20)], matrices(right + 20), matrices(right)
    difference, half = evaluate.paired_difference(one, other, frames)
    assert 0 < half < difference < evaluate.bootstrap(one, frames)["miou"]
    assert evaluate.paired_difference(one, one, frames) == (0, 0)


@pytest.mark.parametrize("weights, expected", [
    (None, [1, 1, 1, 0, 0, 0, 0, 0]), ([0.3, 1.0], [1, 1, 1, 1, 1, 1, 0, 0])])
def test_predictions_are_of_enlarged_and_weighted_logits(data, weights, expected):
    """Bilinear from 2 to 8 pixels, 0 and 4 become 0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4."""
    logits = torch.tensor([[0.0, 4.0], [1.1, 1.1]]).view(1, 2, 1, 2).expand(1, 2, 2, 2)
    network = SegNet(num_classes=2, width=0.0625)
    network.forward = lambda images: logits
    learned = dict(classes=read_classes(data), settings={}, logit_weights=weights)
    predict = Predictor(learned, network, CPU, "fp32")
    prediction, returned = predict(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (8, 8))
    assert prediction.tolist() == returned.argmax(1).tolist() == [[expected] * 8]


def test_results_do_not_depend_on_batches_or_workers(data, run):
    classes, criterion = read_classes(data), train.Criterion(read_classes(data))
    predict = Predictor(*evaluate.load_checkpoint(run), CPU, "fp32")
    split = Split(data, "test", classes)
    confusions, loss = evaluate.evaluate_split(predict, split, 7, 0, criterion=criterion)
    again, same = evaluate.evaluate_split(predict, split, 2, 1, criterion=criterion)
    assert confusions.sum() == 7 * 64 * 64 and torch.equal(confusions, again)
    batch = split[range(7)]
    prediction, logits = predict(batch["images"], (64, 64))
    assert loss == pytest.approx(tiny.criterion(logits, batch["labels"]).item(), rel=1e-5)
    assert loss == pytest.approx(same, rel=1e-5)
    some, _ = evaluate.evaluate_split(predict, split, 2, 0, indices=[1, 4, 5])
    assert torch.equal(some, confusions[[1, 4, 5]])


# ---- Prepared data

def test_split_loads_what_is_stored(data):
    classes = read_classes(data) | dict(mean=[0.1, 0.2, 0.3])
    split = Split(data, "val", classes)
    batch, frame = split[[1, 0]], split.frames[1]
    assert split.clips == [f"val_c{clip:04d}" for clip in (1, 1, 1, 2, 2, 2, 3)]
    stored, label = (np.array(Image.open(data / "val" / path)) for path in
                     (f"images/{frame}.jpg", f"labels/{frame}.png"))
    assert (batch["images"][0].permute(1, 2, 0).numpy() == stored).all()
    assert (batch["labels"][0].numpy() == label).all()
    normalised = evaluate.normalise(batch["images"], classes)[0].permute(1, 2, 0)
    assert np.allclose(normalised, (stored / 255 - classes["mean"]) / 0.25, atol=1e-5)
    joints = np.load(data / "val" / "joints.npz")["joints"][1]
    assert np.array_equal(batch["joints"][0], joints, equal_nan=True)
    small = Split(data, "val", classes, 32)[[1]]        # labels stay as large as they were prepared
    assert small["images"].shape == (1, 3, 32, 32) and (small["labels"][0].numpy() == label).all()
    assert np.allclose(small["joints"][0], (joints + 0.5) / 2 - 0.5, equal_nan=True)


def write_own(data, name, image, label, suffix="png", **options):
    for picture, path in ((image, f"images/{name}.{suffix}"), (label, f"labels/{name}.png")):
        path = data / "train" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture.save(path, **(options if path.parent.name == "images" else {}))
        path.with_name(f"._{path.name}").write_bytes(b"of macOS")
    (data / "classes.json").write_text('{"names": ["sky", "cat", "dog"]}')


def test_own_data_needs_names_alone(tmp_path):
    """Also: suffixes in any case, a photo turned by its EXIF, grey labels resized to their ids."""
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:8], upright[8:, :8], upright[8:, 8:] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
    label = np.where(upright[..., 0], 2, np.where(upright[..., 1], 255, 0)).astype(np.uint8)
    write_own(tmp_path, "IMG_0001", np.rot90(upright), label, "JPG", exif=TURNED)
    write_own(tmp_path, "IMG_0002", upright[:, ::-1], label[:, ::-1], "jpeg")
    write_own(tmp_path, "IMG_0003", upright[..., 0], label, "PNG")
    classes = read_classes(tmp_path, count=True)
    np.savez(tmp_path / "train" / "joints", frames=["IMG_0002"], joints=np.ones((1, 5, 2)))
    split = Split(tmp_path, "train", classes, 16, labels_at_size=True)
    batch = split[[0, 1, 2]]
    assert batch["joints"][:, 4, 0].nan_to_num(-1).tolist() == [-1, 0.25, -1]      # where unknown
    assert split.clips == ["IMG_0001", "IMG_0002", "IMG_0003"] and classes["size"] == 32
    assert (batch["labels"][0].numpy() == label[1::2, 1::2]).all()
    for colour, (y, x) in enumerate([(1, 8), (12, 1), (12, 12)]):
        assert batch["images"][0][:, y, x].argmax() == colour
    assert len(batch["images"][2].unique()) > 2             # averaged where it shrinks
    assert classes["pixels"] == [3 * (label == k).sum() for k in range(3)]
    stored = np.stack([Image.open(path).convert("RGB") for path in
                       (tmp_path / "train" / "images").glob("IMG*")]).reshape(-1, 3) / 255
    assert classes["mean"] + classes["std"] == pytest.approx([*stored.mean(0), *stored.std(0)])
    (tmp_path / "train" / "labels").rename(tmp_path / "elsewhere")
    assert read_classes(tmp_path, count=True) == classes    # kept: nothing is read again


@pytest.mark.parametrize("label, words", [
    (GOOD + (GOOD == 2), "labels/b.png;label 3;0 to 2"), (GOOD[:16], "labels/b.png;32 pixels"),
    (Image.fromarray(GOOD > 0), "labels/b.png;grey or palette PNG;README"),
    (Image.fromarray(GOOD).convert("RGB"), "labels/b.png;grey or palette PNG;README"),
    (GOOD // 255 * 255, "255 means ignore;0 and 1")])
def test_bad_labels_are_named_and_mended(label, words, tmp_path):
    write_own(tmp_path, "b", GOOD, label)
    with pytest.raises(Problem) as problem:
        read_classes(tmp_path, count=True)
    assert all(word in str(problem.value) for word in words.split(";"))
    write_own(tmp_path, "b", GOOD, GOOD)
    assert read_classes(tmp_path, count=True)["pixels"] == [256, 256, 256]
    (tmp_path / "train" / "labels" / "b.png").unlink()
    with pytest.raises(Problem, match="images/b.png has no label .*labels/b.png"):
        Split(tmp_path, "train", read_classes(tmp_path))


# ---- The command

def test_a_report_worked_by_hand():
    confusion = torch.tensor([[[9, 1, 0, 0], [0, 5, 3, 0], [1, 1, 6, 0], [4, 0, 0, 0]]])
    text = report(["ground", "leftArm", "rightArm", "head"], [0, 2, 1, 3], confusion, arms=[1, 2])
    assert "40.0" in re.search("left and right confused.*", text)[0]        # 4 of 10 wrong pixels
    assert "68.8" in re.search("accuracy: arms.*", text)[0]                 # 5 / 8 and 6 / 8
    cells = text.partition("| rightArm ")[2].split()[1:9:2]
    assert cells == ["54.5", "70.6", "66.7", "75.0"]        # IoU 6 / 11, F1 12 / 17, 6 / 9, 6 / 8


def test_networks_are_measured_and_compared(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = [0.1 + index % 3 for index in range(5)]       # of a network with direct weighting
    other = save(tmp_path / "runs" / "second" / "last.pt", data, 1, weights)
    os.utime(save(tmp_path / "runs" / "old" / "best.pt", data, 2), (1, 1))
    os.utime(other, (4e9, 4e9))         # without a path, the newest best.pt is measured anyway
    split, expected = Split(data, "test", read_classes(data)), []
    for path in (run, other):
        predict = Predictor(*evaluate.load_checkpoint(path), CPU, "fp32")
        confusions, _ = evaluate.evaluate_split(predict, split, 7, 0)
        expected.append(evaluate.percent(scores(confusions.sum(0))["miou"],
                                         evaluate.bootstrap(confusions, split.clips)["miou"]))
    for paths, values in ([], expected[:1]), ([run, other], expected):
        argv = ["--ckpt", *paths, "--workers", 0, "--precision", "fp32"]
        status, printed, _ = command(capsys, *argv)
        found = re.search(r"\| mIoU .*", printed)[0]
        assert status == 0 and re.findall(r"[\d.]+ \+- [\d.]+", found) == values
    assert "first against second" in printed
    report = (run.parent / "test" / "report.md").read_text()
    for words in ("stand-in, not SURREAL", "7 images", "3 clips", "| rightUpLeg", expected[0]):
        assert words in report
    assert min(Image.open(run.parent / "test" / "examples.png").size) > 300


def test_pictures_of_all_kinds(run, tmp_path, capsys, monkeypatch):
    folder, out = tmp_path, tmp_path / "out"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8))
    image.save(folder / "a.JPG", exif=TURNED)
    image.convert("RGBA").save(folder / "a.png")
    image.convert("P").resize((18, 2048)).save(folder / "thin.png", transparency=3)
    (folder / "bad.jpg").write_bytes((folder / "a.JPG").read_bytes()[:800])
    shapes, real = [], evaluate.normalise
    monkeypatch.setattr(evaluate, "normalise", lambda x, c: shapes.append(x.shape) or real(x, c))
    status, printed, _ = command(capsys, "--ckpt", run, "--out", out, "--images", folder, "no.png")
    assert status == 1 and all(f"{name} is no" in printed for name in ("bad.jpg", "no.png"))
    labels = [Image.open(path) for path in sorted(out.glob("*-labels.png"))]
    assert [image.size for image in labels] == [(30, 50), (50, 30), (18, 2048)]
    ids, palette = np.array(labels[2]), sum(tiny.PALETTE[:5], ())
    assert (ids[::2] == ids[1::2]).all() and (*labels[0].getpalette()[:15],) == palette
    assert [(*shape[2:],) for shape in shapes] == [(64, 38), (38, 64), (64, 1)]     # not squeezed
    assert all(image.mode == "P" for image in labels) and len(list(out.glob("*-overlay.png"))) == 3


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_bad_checkpoints_are_refused_and_run_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torch.load(run, weights_only=True)
    for content in ([1, 2], dict(model=Hostile()), good | dict(model="unet"), Hostile()):
        torch.save(content, "bad.pt")
        status, _, complaint = command(capsys, "--ckpt", "bad.pt")
        assert status == 2 and "bad.pt is no usable checkpoint" in complaint
    assert not os.path.exists("trace")


def test_wrong_use_gets_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs" / "first")
    other = tiny.write_prepared(tmp_path / "other", 2, 32, ("train",), names=["background", "cat"])
    same = tiny.write_prepared(tmp_path / "same", 2, 32, ("train", "val"), names=NAMES)
    broken = next((same / "train" / "images").iterdir())
    broken.write_bytes(broken.read_bytes()[:600])
    for argv, words in {
            "": "runs;train.py", "nowhere.pt": "nowhere.pt", f"{run} --data nothing": "nothing",
            f"{run} --data {same} --split train --workers 1": f"{broken}",
            f"{run} --data {other} --split train": f"{other};other classes",
            f"{run} --data {same}": "no split 'test'", f"{run} --split all": "all",
            f"{run} --device toaster": "--device toaster"}.items():
        status, _, complaint = command(capsys, "--ckpt", *argv.split())
        assert status == 2 and all(word in complaint for word in words.split(";")), complaint
