"""The README's commands are understood, its links lead somewhere, its script for own data works."""
import re
import shlex
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
COMMANDS = [part.strip() for line in "\n".join(CODE).replace("\\\n", " ").splitlines()
            for part in line.split("  #")[0].split("&&") if re.match(" *(python|torchrun) ", part)]
SCRIPT, = (code for code in CODE if "import" in code and "classes.json" in code)


def test_commands_links_and_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                             # where there are no runs and no data
    monkeypatch.setattr(prepare_surreal, "synthesize", lambda *_: None)
    for words in map(shlex.split, COMMANDS):
        program = next((word for word in words if word.endswith(".py")), "")
        argv = words[words.index(program) + 1:] if program else []
        if program == "evaluate.py":                        # understood, but nothing is there
            with pytest.raises(evaluate.Problem, match="there is no"):
                evaluate.main(argv)
        elif program == "train.py" and "--resume" not in argv and "--init-from" not in argv:
            train.parse(argv)
        elif program == "prepare_surreal.py":
            assert prepare_surreal.main(argv) == 2          # for want of clips alone
    tests, = (command for command in COMMANDS if "pytest" in command)
    assert tests in (ROOT / ".ci" / "run").read_text() and len(COMMANDS) > 8
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in target]
    assert targets and all((ROOT / target).exists() for target in targets)
    for section in re.split(r"^## ", TEXT, flags=re.M):
        figures = re.search(r"^\|.*mIoU.*\n(\|.*\n)*\|.*\d\.\d", section, re.M)     # in a table
        assert not figures or "not SURREAL" in " ".join(section.split()), section[:80]


def test_the_script_for_own_data_makes_a_folder_that_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = np.repeat([[255], [0]], [40, 20], axis=0).repeat(90, 1).astype(np.uint8)     # (60, 90)
    for path in (Path(folder, f"{i}.png") for folder in ("pictures", "masks") for i in range(20)):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(mask).save(path)
    exec(SCRIPT, {})
    data, = (str(path.parent) for path in tmp_path.rglob("classes.json"))
    for path in Path(data).glob("*/labels/*.png"):          # squares, with 255 around the picture
        assert np.asarray(Image.open(path))[[0, 100, 220, -1], 160].tolist() == [255, 1, 0, 255]
    train.start(["--model", "segnet", "--width", "0.1", "--data", data, "--size", "64",
                 "--iterations", "1", "--batch-size", "2", "--workers", "0"])
