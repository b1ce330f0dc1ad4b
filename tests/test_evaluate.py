"""evaluate.py: its figures against hand-worked ones, the paper's and NumPy's; strange files."""
import json
import multiprocessing
import os
import re
import subprocess
import sys
import types
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import tiny
from evaluate import Predictor, Problem, SegNet, Split, read_classes, scores

CPU = torch.device("cpu")
NAMES = tiny.NAMES[:5]
KWARGS = dict(num_classes=5, width=0.0625)
TURNED = Image.Exif()
TURNED[0x0112] = 6      # to be shown a quarter turn clockwise
GOOD = np.array([[0, 1], [2, 255]], np.uint8)
GOOD = GOOD.repeat(16, 0).repeat(16, 1)     # a label


def matrices(right):
    """(G, 2, 2): `right` of 1000 background pixels found, and all 1000 of the body."""
    body = [0, 1000]
    return np.array([([r, 1000 - r], body) for r in right])


def same(values, expected):
    return np.allclose(values, expected, atol=1e-5, equal_nan=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_prepared(tmp_path_factory.mktemp("data"), 7, names=NAMES, groups={})


def save(path, data, seed, weights=None):
    torch.manual_seed(seed)
    return tiny.write_checkpoint(path, SegNet(**KWARGS), "segnet", data, weights, kwargs=KWARGS)


@pytest.fixture
def run(tmp_path, data):
    return save(tmp_path / "runs" / "first" / "best.pt", data, seed=0)


def report(confusion, **classes):
    """report_text of one image, its confusion (K, K)."""
    folder = tiny.Path("test")
    split = types.SimpleNamespace(frames=["a"], groups=["a"], folder=folder, size=64)
    classes = dict(groups=tiny.GROUPS, merge={}, source="own") | classes
    confusions = np.array([confusion])
    run = dict(name="net", confusions=confusions, split=split, classes=classes)
    return evaluate.report_text([run])


def command(capsys, *argv):
    """Exit status, printed text and complaint of evaluate.py, which is one sentence at most."""
    words = [str(word) for word in argv]
    with pytest.raises(SystemExit) as end:
        evaluate.run_command("evaluate.py", lambda: evaluate.main(words))
    printed, complaint = capsys.readouterr()
    assert complaint.count("\n") == (end.value.code == 2) and "Traceback" not in complaint
    return end.value.code, printed, complaint


def read(split, criterion=None, batch_size=7, workers=0, run=None):
    """evaluate_frames of a split, each frame a group of its own."""
    predict = Predictor(*evaluate.load_checkpoint(run), CPU, "fp32")
    frames = range(len(split.frames))
    chunks = [frames[start:start + batch_size] for start in frames[::batch_size]]
    batches = evaluate.reader(split, chunks, workers, CPU)
    return evaluate.evaluate_frames(predict, batches, frames, criterion)


# ---- Metrics

def test_figures_of_a_matrix_worked_by_hand():
    result = scores([[5, 1, 0], [2, 3, 1], [0, 0, 4]])
    expected = dict(
        iou=[5 / 8, 3 / 7, 4 / 5],
        class_f1=[10 / 13, 6 / 10, 8 / 9],
        recall=[5 / 6, 3 / 6, 1],
        class_precision=[5 / 7, 3 / 4, 4 / 5],
        miou=(5 / 8 + 3 / 7 + 4 / 5) / 3,
        accuracy=12 / 16,
        f1=(10 / 13 + 6 / 10 + 8 / 9) / 3,
        class_accuracy=(5 / 6 + 3 / 6 + 1) / 3,
        body_f1=16 / 19,
    )
    assert result.keys() == expected.keys() >= evaluate.FIGURES.keys()
    for key, value in expected.items():
        assert result[key] == pytest.approx(value), key


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_absent_classes_are_skipped_not_scored():
    missed = scores([[8, 0, 0], [0, 0, 0], [2, 0, 0]])      # 1 occurs nowhere, 2 is missed
    predicted = scores([[8, 2, 0], [0, 0, 0], [0, 0, 0]])   # 1 is predicted, and never true
    nan = np.nan
    assert same(missed["iou"], [0.8, nan, 0])
    assert same(predicted["iou"], [0.8, 0, nan])
    assert (missed["miou"], missed["class_accuracy"]) == pytest.approx((0.4, 0.5))
    assert same(missed["class_precision"], [0.8, nan, nan])
    assert same(predicted["recall"], [0.8, nan, nan])
    nothing = scores(np.zeros((3, 3)))
    assert all(np.isnan(nothing[key]) for key in evaluate.FIGURES)


def test_two_images_that_other_libraries_score_otherwise():
    """README: 82.2 here and in torchmetrics' JaccardIndex, 61.7 to 87.1 elsewhere."""
    labels = torch.zeros(2, 1, 10, dtype=torch.uint8)
    labels[0, 0, 8:] = 1            # 0 0 0 0 0 0 0 0 1 1
    labels[1, 0, 6:] = 2            # 0 0 0 0 0 0 2 2 2 2
    prediction = labels.long()
    prediction[0, 0, 7] = 2         # 0 0 0 0 0 0 0 2 1 1
    prediction[1, 0, 9] = 0         # 0 0 0 0 0 0 2 2 2 0
    counts = evaluate.confusion_matrices(prediction, labels, 4).sum(0)      # 3 is absent
    miou = (13 / 15 + 2 / 2 + 3 / 5) / 3
    assert scores(counts)["miou"] == pytest.approx(miou)


def test_counts_agree_with_numpy_pixel_by_pixel():
    rng, K = np.random.default_rng(1), 25
    labels, prediction = rng.integers(0, K, (2, 3, 40, 30))
    labels[rng.random(labels.shape) < 0.2] = 255
    expected = np.zeros((3, K, K), int)
    for image, *pixel in np.argwhere(labels != 255):
        expected[image, labels[image, *pixel], prediction[image, *pixel]] += 1
    labels = torch.tensor(labels, dtype=torch.uint8)
    counted = evaluate.confusion_matrices(torch.tensor(prediction), labels, K)
    assert counted.dtype == torch.int64 and (counted.numpy() == expected).all()


@pytest.mark.parametrize("columns, mean", [        # Table 2, ICNet normal; Table 5, SegNet doubled
    ((98.9, 84.9, 74.78, 64.3, 53.8, 64.0, 54.2, 52.7, 39.5, 32.3, 19.8, 9.3, 9.5), 48.7),
    ((99.1, 84.2, 70.9, 63.2, 58.4, 58.1, 51.8, 52.7, 43.9, 39.9, 28.8, 12.4, 9.8), 49.9)])
def test_the_papers_all_classes_column_is_the_mean_over_25(columns, mean):
    confusion = np.zeros((25, 25), int)
    for accuracy, ids in zip(columns, tiny.GROUPS.values()):
        right = round(100 * accuracy)
        confusion[ids, ids] = right
        confusion[ids, np.array(ids) - 1] = 10000 - right       # goes to another class
    text = report(confusion, names=tiny.NAMES, mirror=tiny.MIRROR)
    for column, accuracy in zip(tiny.GROUPS, columns):
        assert f"{accuracy:.1f}" in re.search(rf"accuracy: {column} .*", text)[0]
    assert 100 * scores(confusion)["class_accuracy"] == pytest.approx(mean, abs=0.05)


def test_intervals_are_over_groups():
    right = np.random.default_rng(3).integers(200, 900, 20)
    half = evaluate.bootstrap(matrices(right))["accuracy"]
    accuracy = (right + 1000) / 2000
    assert half == pytest.approx(1.96 * accuracy.std() / 20 ** 0.5, rel=0.15)
    ten_frames_each = evaluate.bootstrap(10 * matrices(right))["accuracy"]
    assert half == pytest.approx(ten_frames_each)       # equal frames hold no more than one
    by_frame = evaluate.bootstrap(matrices(right.repeat(10)))["accuracy"]
    assert half > 2 * by_frame > 0
    assert np.isnan(evaluate.bootstrap(matrices([500]))["miou"])


def test_paired_difference_sees_what_two_intervals_hide():
    right = np.random.default_rng(4).integers(200, 900, 20)
    one, other = matrices(right + 20), matrices(right)
    difference, half = evaluate.paired_difference(one, other)
    assert 0 < half < difference < evaluate.bootstrap(one)["miou"]
    assert evaluate.paired_difference(other, one)[0] == -difference
    assert evaluate.paired_difference(one, one) == (0, 0)


@pytest.mark.parametrize("weights, ones", [(None, 3), ([0.3, 1.0], 6)])
def test_predictions_are_of_enlarged_and_weighted_logits(data, weights, ones):
    """Bilinear from 2 to 8 pixels, 0 and 4 become 0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4."""
    expected = [1] * ones + [0] * (8 - ones)
    logits = torch.tensor([[0.0, 4.0], [1.1, 1.1]])
    logits = logits.view(1, 2, 1, 2).expand(1, 2, 2, 2)
    network = SegNet(num_classes=2, width=0.0625)
    network.forward = lambda images: logits
    learned = dict(classes=read_classes(data), settings={}, logit_weights=weights)
    predict = Predictor(learned, network, CPU, "fp32")
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    prediction, returned = predict(image, (8, 8))
    assert prediction.tolist() == [[expected] * 8]
    assert torch.equal(prediction, returned.argmax(1))


class Criterion:
    def totals(self, logits, labels):
        count = (labels != 255).sum()
        return tiny.criterion(logits, labels) * count, count


def test_results_do_not_depend_on_batches_or_workers(data, run):
    split = Split(data, "test", read_classes(data))
    confusions, miou, loss = read(split, Criterion(), 7, 0, run)
    again, same_miou, same_loss = read(split, Criterion(), 2, 1, run)
    assert confusions.shape == (7, 5, 5) and confusions.sum() == 7 * 64 * 64
    assert (confusions == again).all() and (miou == same_miou).all()
    assert (miou == scores(confusions)["miou"]).all()
    batch = split[range(7)]
    predict = Predictor(*evaluate.load_checkpoint(run), CPU, "fp32")
    _, logits = predict(batch["images"], (64, 64))
    expected = tiny.criterion(logits, batch["labels"]).item()
    assert (loss, same_loss) == pytest.approx((expected, expected), rel=1e-5)
    assert np.isnan(read(split, run=run)[2])
    batches = evaluate.reader(split, [[1, 4], [5]], 0, CPU)
    groups = np.array([1, 0, 1])
    some, _, _ = evaluate.evaluate_frames(predict, batches, groups)
    assert (some[0] == confusions[4]).all()
    assert (some[1] == confusions[1] + confusions[5]).all()


# ---- Prepared data

@pytest.mark.parametrize("frames, groups", [
    (["01_01_c0001_037", "ung_01_01_c0002_001", "104_02_c0001_001"], ["01_01", "01_01", "104_02"]),
    (["walk_0001", "walk_0002", "run_001"], ["walk", "walk", "run"]),
    (["NAME_001", "NAME_002", "NAME_003"], ["NAME_001", "NAME_002", "NAME_003"])])
def test_frames_of_a_video_are_one_group(tmp_path, frames, groups):
    for frame in frames:
        write_own(tmp_path, frame, GOOD, GOOD)
    split = Split(tmp_path, "train", read_classes(tmp_path))
    assert dict(zip(split.frames, split.groups)) == dict(zip(frames, groups))
    assert evaluate.shared_groups(tmp_path) == []
    write_own(tmp_path, frames[0][:-3] + "100", GOOD, GOOD, split="test")
    shared = groups[:1] if len(set(groups)) == 2 else []
    assert evaluate.shared_groups(tmp_path) == shared
    (tmp_path / "train").rename(tmp_path / "val")           # val and test may share
    assert evaluate.shared_groups(tmp_path) == []


def test_split_loads_what_is_stored(data):
    classes = read_classes(data) | dict(mean=[0.1, 0.2, 0.3])
    split = Split(data, "val", classes)
    batch = split[[1, 0]]
    frame = split.frames[1]
    image = batch["images"][0].permute(1, 2, 0)
    assert split.groups == ["val_c0001"] * 3 + ["val_c0002"] * 3 + ["val_c0003"]
    stored = np.array(Image.open(data / "val" / "images" / f"{frame}.jpg"))
    label = np.array(Image.open(data / "val" / "labels" / f"{frame}.png"))
    assert (image.numpy() == stored).all()
    assert (batch["labels"][0].numpy() == label).all()
    normalised = evaluate.normalise(batch["images"], classes)[0]
    expected = (stored / 255 - classes["mean"]) / 0.25
    assert same(normalised.permute(1, 2, 0), expected)
    joints = np.load(data / "val" / "joints.npz")["joints"][1]
    assert np.array_equal(batch["joints"][0], joints, equal_nan=True)
    small = Split(data, "val", classes, 32)[[1]]
    image = small["images"][0].permute(1, 2, 0).numpy()
    assert image.shape == (32, 32, 3)
    assert (small["labels"][0].numpy() == label).all()      # as large as they were prepared
    assert same(small["joints"][0], (joints + 0.5) / 2 - 0.5)
    halved = stored.reshape(32, 2, 32, 2, 3).mean((1, 3))   # means of 2 x 2 pixels
    assert abs(image - halved).mean() < 3


def write_joints(data, frame, joints):
    np.savez(data / "train" / "joints", frames=[frame], joints=[joints])


def write_own(data, name, image, label, suffix="png", split="train", **options):
    (data / "classes.json").write_text('{"names": ["sky", "cat", "dog"]}')
    for kind, picture, ending in ("images", image, suffix), ("labels", label, "png"):
        path = data / split / kind / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture.save(path, **(options if kind == "images" else {}))
        path.with_name(f"._{path.name}").write_bytes(b"of macOS")


def test_own_data_needs_names_alone(tmp_path):
    """Also: suffixes in any case, a photo turned by its EXIF, grey labels resized to their ids."""
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:8] = (240, 0, 0)
    upright[8:, :8] = (0, 240, 0)
    upright[8:, 8:] = (0, 0, 240)
    label = np.zeros((32, 32), np.uint8)
    label[:8] = 2
    label[8:, :8] = 255
    write_own(tmp_path, "IMG_0001", np.rot90(upright), label, "JPG", exif=TURNED)
    write_own(tmp_path, "IMG_0002", np.fliplr(upright), np.fliplr(label), "jpeg")
    write_own(tmp_path, "IMG_0003", upright[..., 0], label, "PNG")
    classes = read_classes(tmp_path, count=True)
    write_joints(tmp_path, "IMG_0002", np.ones((5, 2)))
    split = Split(tmp_path, "train", classes, 16, labels_at_size=True)
    batch = split[[0, 1, 2]]
    x = batch["joints"][:, 4, 0]
    assert same(x, [np.nan, 0.25, np.nan])      # NaN where unknown
    assert split.frames == ["IMG_0001", "IMG_0002", "IMG_0003"]
    assert classes["size"] == 32
    turned, _, grey = batch["images"]
    assert (batch["labels"][0].numpy() == label[1::2, 1::2]).all()
    for colour, y, x in (0, 1, 8), (1, 12, 1), (2, 12, 12):
        assert turned[:, y, x].argmax() == colour
    assert len(grey.unique()) > 2               # averaged where it shrinks
    assert classes["pixels"] == [3 * 24 * 24, 0, 3 * 8 * 32]
    paths = (tmp_path / "train" / "images").glob("IMG*")
    stored = [Image.open(path).convert("RGB") for path in paths]
    stored = np.stack(stored).reshape(-1, 3) / 255
    assert classes["mean"] == pytest.approx(stored.mean(0))
    assert classes["std"] == pytest.approx(stored.std(0))


def read_only(path, text, encoding):
    raise PermissionError(13, "Permission denied", path)


def test_own_counts_are_kept_and_those_of_others_are_not_believed(tmp_path, capsys, monkeypatch):
    path = tmp_path / "classes.json"
    write_own(tmp_path, "a", GOOD, GOOD)
    names = {"1": "cat", "0": "sky", "2": "dog"}
    stored = dict(names=names, mean=[0.1] * 3, pixels=[9, 9, 9])
    path.write_text(json.dumps(stored))
    classes = read_classes(tmp_path, count=True)
    assert classes["pixels"] == [256, 256, 256] and classes["mean"] == [0.1] * 3
    assert classes["names"] == ["sky", "cat", "dog"]
    monkeypatch.setattr(evaluate, "count_pixels", None)
    assert read_classes(tmp_path, count=True) == classes        # nothing is counted again
    monkeypatch.undo()
    counted = path.read_text()
    write_own(tmp_path, "b", GOOD, GOOD)
    path.write_text(counted)
    monkeypatch.setattr(evaluate.Path, "write_text", read_only)
    assert read_classes(tmp_path, count=True)["pixels"] == [512, 512, 512]
    assert "cannot be written" in capsys.readouterr().out and path.read_text() == counted


def test_accents_may_be_stored_in_two_ways(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_own(tmp_path, "b", GOOD, GOOD)
    write_own(tmp_path, apart, GOOD, GOOD)
    label = tmp_path / "train" / "labels" / f"{apart}.png"
    label.rename(label.with_name(f"{composed}.png"))
    write_joints(tmp_path, apart, np.ones((2, 2)))
    split = Split(tmp_path, "train", read_classes(tmp_path))
    assert split.frames == ["b", composed]
    assert same(split[[1]]["joints"], 1)
    write_joints(tmp_path, "other", np.ones((2, 2)))
    with pytest.raises(Problem, match="joints.npz .* no frame"):
        Split(tmp_path, "train", read_classes(tmp_path))


@pytest.mark.parametrize("label, words", [
    (GOOD + (GOOD == 2), "labels/b.png;label 3;0 to 2"),
    (GOOD[:16], "labels/b.png;32x16"),
    (Image.fromarray(GOOD > 0), "labels/b.png;grey or palette PNG;README"),
    (Image.fromarray(GOOD).convert("RGB"), "labels/b.png;grey or palette PNG;README"),
    (GOOD // 255 * 255, "255 means ignore;0 and 1")])
def test_bad_labels_are_named_and_mended(label, words, tmp_path):
    write_own(tmp_path, "b", GOOD, label)
    with pytest.raises(Problem) as problem:
        read_classes(tmp_path, count=True)
    assert all(word in str(problem.value) for word in words.split(";")), problem.value
    write_own(tmp_path, "b", GOOD, GOOD)
    assert read_classes(tmp_path, count=True)["pixels"] == [256, 256, 256]
    path = tmp_path / "train" / "labels" / "b.png"
    path.rename(path.with_suffix(".jpg"))       # JPEG would blur the ids
    with pytest.raises(Problem, match="images/b.png has no label .*labels/b.png"):
        Split(tmp_path, "train", read_classes(tmp_path))


@pytest.mark.parametrize("entry, words", [
    ('"mean": [120, 110, 100]', "mean;to 1"),
    ('"std": [60, 60, 60]', "std;to 1"),
    ('"mirror": [1, 2, 0]', "mirror;back"),
    ('"mirror": [0, 1]', "mirror;(3,)"),
    ('"mirror": [[1, 2]]', "mirror;(3,)"),
    ('"mirror": ["sky", "dog", "cat"]', "mirror;dog"),
    ('"mirror": [0, 1, 3]', "mirror;2"),
    ('"palette": [[0, 0, 0]]', "palette;(3, 3)"),
    ('"palette": ["#000000", "#ff0000", "#00ff00"]', "palette;#ff0000"),
    ('"palette": [[0, 0, 0], [1, 0, 0], [0, 0.5, 0]]', "palette;255"),
    ('"names": "sky"', "names;list"),
    ('"names": {"sky": 0, "cat": 1, "dog": 2}', "names;list"),
    ('"names": ["sky"]', "names;2"),
    (f'"names": {json.dumps([str(i) for i in range(256)])}', "names;255"),
    ('"merge": {"animal": [1, 3]}', "merge;0 to 2"),
    ('"mirror": [0, 2, 1', "line 2;column"),
    ('"title": "\udce9"', "classes.json is no JSON"),
    ('"title": "mine"', None)])
def test_classes_are_checked_where_they_are_read(entry, words, tmp_path):
    names = "" if "names" in entry else '"names": ["sky", "cat", "dog"],'
    text = f"{{{names}\n{entry}}}"
    (tmp_path / "classes.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    if words is None:
        assert read_classes(tmp_path)["names"] == ["sky", "cat", "dog"]
        return
    with pytest.raises(Problem) as problem:
        read_classes(tmp_path)
    for word in ("classes.json", *words.split(";")):
        assert word in str(problem.value)


# ---- Devices

@pytest.mark.parametrize("able, picked", [
    ({"avx512_bf16": True}, "bf16"),
    ({"avx2": True}, "fp32"),
    (None, "fp32")])
def test_a_cpu_computes_in_what_it_is_fast_in(able, picked, monkeypatch, capsys):
    monkeypatch.delattr(torch.cpu, "get_capabilities")      # as in torch 2.11
    if able:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert evaluate.pick_device("cpu") == (CPU, picked)
    assert evaluate.pick_device("cpu", "bf16") == (CPU, "bf16")
    assert ("ten times slower" in capsys.readouterr().out) == (picked == "fp32")


@pytest.mark.parametrize("capability, picked", [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_cards_before_ampere_compute_in_fp16(capability, picked, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")      # nobody asks the CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert evaluate.fastest_precision(torch.device("cuda")) == picked


def test_a_card_that_torch_cannot_use_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for card in (None, "/usr/bin/nvidia-smi"):
        monkeypatch.setattr(evaluate.shutil, "which", lambda program: card)
        evaluate.pick_device()
        assert ("no GPU is used" in capsys.readouterr().out) == bool(card)


@pytest.mark.parametrize("workers, device, processes, count", [
    (None, "cpu", 1, 1),
    (None, "cuda", 1, 12),
    (None, "cuda", 4, 3),
    (None, "cuda", 24, 1),
    (0, "cuda", 1, 0),
    (5, "cpu", 1, 5)])
def test_a_gpu_is_fed_by_every_core(workers, device, processes, count, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert evaluate.reader_count(workers, torch.device(device), processes) == count
    monkeypatch.setattr(os, "cpu_count", lambda: 200)
    assert evaluate.reader_count(None, torch.device("cuda")) == 16


def test_fp16_predicts_like_fp32(data, run):
    images = Split(data, "test", read_classes(data))[range(4)]["images"]
    logits = {}
    for precision in ("fp32", "fp16", "bf16"):
        predict = Predictor(*evaluate.load_checkpoint(run), CPU, precision)
        _, logits[precision] = predict(images, (64, 64))
        assert logits[precision].dtype == torch.float32
    for precision, tolerance in ("fp16", 0.01), ("bf16", 0.1):
        error = (logits[precision] - logits["fp32"]).abs().mean()
        assert tolerance / 100 < error < tolerance, precision


def test_readers_can_stay_alive(data):
    split = Split(data, "test", read_classes(data))
    batches = evaluate.reader(split, [[1], [2, 3]], 1, CPU, persistent=True)
    assert len(batches) == 2
    for _ in range(2):
        sizes = [len(batch["images"]) for batch in batches]
        assert sizes == [1, 2]
        readers = multiprocessing.active_children()
    assert readers == multiprocessing.active_children() != []


# ---- The command

def test_a_report_worked_by_hand():
    confusion = [[9, 1, 0, 0],
                 [0, 5, 3, 0],
                 [1, 1, 6, 0],
                 [4, 0, 0, 0]]
    text = report(
        confusion,
        names=["ground", "leftArm", "rightArm", "head"],
        mirror=[0, 2, 1, 3],
        groups=dict(arms=[1, 2]),
        merge=dict(ground=[0], arms=[1, 2]))
    assert "40.0" in re.search("left and right confused.*", text)[0]        # 4 of 10 wrong pixels
    assert "68.8" in re.search("accuracy: arms.*", text)[0]                 # 5 / 8 and 6 / 8
    cells = text.partition("| rightArm ")[2].split()[1:9:2]
    assert cells == ["54.5", "70.6", "66.7", "75.0"]        # IoU 6 / 11, F1 12 / 17, 6 / 9, 6 / 8
    merged = text.partition("merged")[2]        # [[9, 1], [1, 15]]; the head is in no class of it
    assert merged.partition("| arms ")[2].split()[1] == "88.2"              # 15 / 17
    assert merged.partition("| mean ")[2].split()[1] == "85.0"              # and 9 / 11


def test_networks_are_measured_and_compared(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = [0.1 + index % 3 for index in range(5)]       # of a network with direct weighting
    other = save(tmp_path / "elsewhere" / "first" / "best.pt", data, 1, weights)
    split = Split(data, "test", read_classes(data))
    expected = []
    for path in (run, other):
        frames, _, _ = read(split, run=path)
        groups = [frames[:3].sum(0), frames[3:6].sum(0), frames[6]]
        half = evaluate.bootstrap(np.stack(groups))["miou"]
        miou = scores(frames.sum(0))["miou"]
        expected.append(evaluate.percent(miou, half))
    for paths, values in ([], expected[:1]), ([run, other], expected):
        argv = ["--ckpt", *paths, "--workers", 0, "--precision", "fp32"]
        status, printed, _ = command(capsys, *argv)
        found = re.search(r"\| mIoU .*", printed)[0]
        assert status == 0 and re.findall(r"[\d.]+ \+- [\d.]+", found) == values
    assert f"{run.parent}/best against {other.parent}/best" in printed      # alike names differ
    report = (run.parent / "test" / "report.md").read_text()
    groups = "7 images of", "3 groups (sequences"
    for words in ("stand-in, not SURREAL", *groups, "| rightUpLeg", expected[0]):
        assert words in report
    assert min(Image.open(run.parent / "test" / "examples.png").size) > 300


def test_groups_that_train_shares_are_named(run, data, tmp_path, capsys):
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            for path in (data / "test" / kind).iterdir():
                copy = tmp_path / "leak" / split / kind / path.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    (tmp_path / "leak" / "classes.json").write_bytes((data / "classes.json").read_bytes())
    argv = ["--ckpt", run, "--data", tmp_path / "leak", "--workers", 0]
    status, printed, _ = command(capsys, *argv)
    assert status == 0 and "3 groups are in train too, test_c0001 for example" in printed


def test_pictures_of_all_kinds(run, tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    for place in (folder / "one", folder / "two" / "deep"):
        place.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (30, 50, 3), np.uint8)
    image = Image.fromarray(noise)
    image.save(folder / "one" / "a.JPG", exif=TURNED)
    image.convert("RGBA").save(folder / "one" / "a.png")
    thin = image.convert("P").resize((18, 2048))
    thin.save(folder / "two" / "thin.png", transparency=3)
    image.resize((4000, 3)).save(folder / "two" / "a.png")
    names = ["a.webp", "b.bmp", "c.tif", os.fsdecode(b"d\xe9.png")]
    for name in names:
        image.save(folder / "two" / "deep" / name)
    (folder / "bad.jpg").write_bytes((folder / "one" / "a.JPG").read_bytes()[:800])
    shapes = set()
    real = evaluate.normalise

    def normalise(images, *arguments):
        shapes.add(tuple(images.shape[2:]))
        return real(images, *arguments)

    monkeypatch.setattr(evaluate, "normalise", normalise)
    argv = ["--ckpt", run, "--out", out, "--images", folder, folder / "no.png"]
    status, printed, _ = command(capsys, *argv)
    assert status == 1 and all(f"{name} is no" in printed for name in ("bad.jpg", "no.png"))
    sizes = {path.relative_to(out).as_posix(): Image.open(path).size
             for path in out.rglob("*-labels.png")}
    assert sizes == {
        "one/a.JPG-labels.png": (30, 50),
        "one/a.png-labels.png": (50, 30),
        "two/thin.png-labels.png": (18, 2048),
        "two/a.png-labels.png": (4000, 3),
        **{f"two/deep/{name}-labels.png": (50, 30) for name in names}}
    thin = Image.open(out / "two" / "thin.png-labels.png")
    ids = np.array(thin)
    assert thin.mode == "P" and (ids[::2] == ids[1::2]).all()
    assert thin.getpalette()[:15] == np.ravel(tiny.PALETTE[:5]).tolist()
    assert shapes == {(64, 38), (38, 64), (64, 1), (1, 64)}
    overlays = [Image.open(path) for path in out.rglob("*-overlay.png")]
    assert len(overlays) == 8 and max(max(overlay.size) for overlay in overlays) < 5000


def test_chinese_names_draw_without_a_warning(data, tmp_path):
    names = ["背景", "头", "手"]
    folder = tiny.write_prepared(tmp_path / "data", 1, names=names, groups={})
    kwargs = KWARGS | dict(num_classes=3)
    path = tiny.write_checkpoint(tmp_path / "net.pt", SegNet(**kwargs), "segnet", folder,
                                 kwargs=kwargs)
    images = folder / "test" / "images"
    argv = [sys.executable, evaluate.__file__, "--ckpt", path, "--images", images]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "test_c0001_001" in done.stdout


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_bad_checkpoints_are_refused_and_run_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torch.load(run, weights_only=True)
    unknown = good | dict(model="unet")
    for content in [1, 2], dict(model=Hostile()), unknown, Hostile():
        torch.save(content, "bad.pt")
        status, _, complaint = command(capsys, "--ckpt", "bad.pt")
        assert status == 2 and "bad.pt is no usable checkpoint" in complaint
    assert not os.path.exists("trace")


def test_the_newest_best_checkpoint_is_found(tmp_path):
    for age, name in enumerate(("disk/b/best.pt", "disk/a/best.pt", "runs/c/last.pt")):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (1000 - age, 1000 - age))
    with pytest.raises(Problem, match="no best.pt in .*runs/c/last.pt"):
        evaluate.find_checkpoint(tmp_path / "runs")
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "disk")
    expected = tmp_path / "runs" / "linked" / "b" / "best.pt"
    assert evaluate.find_checkpoint(tmp_path / "runs") == expected
    assert len(evaluate.newest(tmp_path / "runs", "best.pt")) == 2
    assert evaluate.find_checkpoint(tmp_path / "runs/c/last.pt").name == "last.pt"


def test_wrong_use_gets_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path / "runs" / "first")
    names = ["background", "cat"]
    other = tiny.write_prepared(tmp_path / "other", 2, 32, ("train",), names=names)
    alike = tiny.write_prepared(tmp_path / "alike", 2, 32, ("train", "val"), names=NAMES)
    broken = next((alike / "train" / "images").iterdir())
    broken.write_bytes(broken.read_bytes()[:600])
    (tmp_path / "empty").mkdir()
    cases = {
        "": "runs;train.py",
        "nowhere.pt": "nowhere.pt",
        f"{run} --data nothing": "nothing",
        f"{run} --data {alike} --split train --workers 1": f"{broken}",
        f"{run} --data {other} --split train": f"{other};other classes",
        f"{run} --data {alike}": "no split 'test'",
        f"{run} --split all": "all",
        f"{run} --workers -1": "--workers;0 or more",
        f"{run} --device toaster": "--device toaster",
        f"{run} {run} --images {broken}": "one --ckpt",
        f"nowhere.pt --images nowhere.jpg {tmp_path}/empty": "nowhere.jpg;no picture"}
    for argv, words in cases.items():
        status, _, complaint = command(capsys, "--ckpt", *argv.split())
        assert status == 2 and all(word in complaint for word in words.split(";")), complaint


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    (PermissionError(13, "Permission denied", "runs"), 2, "Permission denied: 'runs'"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error"), 2, "--workers"),
    (MemoryError(), 2, "--batch-size")])
def test_what_a_machine_lacks_gets_one_sentence(error, status, words, capsys):
    def function():
        raise error

    with pytest.raises(SystemExit) as end:
        evaluate.run_command("evaluate.py", function)
    complaint = capsys.readouterr().err
    assert end.value.code == status and complaint.count("\n") == 1 and words in complaint


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError):
        evaluate.run_command("evaluate.py", lambda: torch.zeros(2) + torch.zeros(3))
