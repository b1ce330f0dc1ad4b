"""The README's commands are understood, its links lead somewhere, its examples do what they say."""
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import prepare_surreal
import train

ROOT = Path(train.__file__).parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```\w+\n(.*?)```", TEXT, re.S)
COMMANDS = []
for line in "\n".join(CODE).replace("\\\n", " ").splitlines():
    for part in line.split("  #")[0].split("&&"):
        if re.match(" *(python|torchrun) ", part):
            COMMANDS.append(part.strip())


def test_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                             # where there are no runs and no data
    monkeypatch.setattr(prepare_surreal, "synthesize", lambda *_: None)
    shutil.copy(ROOT / ".github" / "standin.pt", "first.pt")    # which the README gets by git show
    for words in map(shlex.split, COMMANDS):
        program = next((word for word in words if word.endswith(".py")), "")
        argv = words[words.index(program) + 1:] if program else []
        if program == "evaluate.py":                        # understood, but nothing is there
            with pytest.raises(evaluate.Problem, match="there is no|no picture"):
                evaluate.main(argv)
        elif program == "train.py" and "--resume" not in argv:
            train.parse(argv)
        elif program == "prepare_surreal.py":
            assert prepare_surreal.main(argv) == 2          # for want of clips or pictures alone
    tests, = (command for command in COMMANDS if "pytest" in command)
    assert tests in (ROOT / ".ci" / "run").read_text()
    assert len(COMMANDS) > 8


def test_links_lead_somewhere_and_tables_say_what_they_were_measured_on():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in target]
    assert targets
    assert not re.search("@[@A-Z]", TEXT)                   # a figure that is to come
    assert all((ROOT / target).exists() for target in targets)
    for section in re.split(r"^## ", TEXT, flags=re.M):
        figures = re.search(r"^\|.*mIoU.*\n(\|.*\n)*\|.*\d\.\d", section, re.M)     # in a table
        assert not figures or "not SURREAL" in " ".join(section.split()), section[:80]


def test_own_pictures_train_by_the_two_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.repeat([[255], [0]], [40, 20], axis=0).repeat(90, 1).astype(np.uint8)     # (60, 90)
    for kind in "pictures", "masks":
        Path(kind).mkdir()
        for number in range(20):
            Image.fromarray(mask).save(f"{kind}/{number}a.png")
    own = [shlex.split(command)[2:] for command in COMMANDS if "data/mine" in command]
    prepared, trained = own
    assert prepare_surreal.main([*prepared, "--workers", "0"]) == 0
    for path in Path("data/mine").glob("*/labels/*.png"):   # squares, with 255 around the picture
        column = np.asarray(Image.open(path))[[0, 100, 220, -1], 160]
        assert column.tolist() == [255, 1, 0, 255]
    more = "--width 0.1 --size 64 --iterations 1 --batch-size 2 --workers 0 --val-images 2"
    assert train.main([*trained, *more.split()]) == 0


def test_the_example_of_mean_iou(capsys):
    example, = (code for code in CODE if "confusion_matrices" in code)
    exec(example, {})
    assert f"{float(capsys.readouterr().out):.3f}" == "0.822"
