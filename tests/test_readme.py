"""The README's commands: each is understood, CI runs the test command, links lead somewhere."""
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import prepare_surreal
import train

ROOT = Path(train.__file__).parent
TEXT = (ROOT / "README.md").read_text()
LINES = [line.partition("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
         for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&") if ".py" in part]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_command_of_the_readme_is_understood(command):
    words = shlex.split(command)
    program = next(word for word in words if word.endswith(".py"))
    argv = words[words.index(program) + 1:]
    assert (ROOT / program).is_file()
    if program == "train.py":
        given = train.parse(argv)
        if "resume" not in given:
            train.resolve(given)
    elif program in ("evaluate.py", "prepare_surreal.py"):
        {"evaluate.py": evaluate, "prepare_surreal.py": prepare_surreal}[program].parse(argv)


def test_commands_are_found_and_ci_runs_the_test_command():
    assert len(COMMANDS) > 8
    tests = next(line for line in LINES if "pytest" in line)
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_and_pictures_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in target]
    assert targets and all((ROOT / target).exists() for target in targets)


def test_the_stand_in_is_named_wherever_its_figures_are():
    sections = re.split(r"^## ", TEXT, flags=re.M)
    for title in ("Results", "Reading the paper's numbers"):
        section = next(section for section in sections if section.startswith(title))
        assert "not SURREAL" in " ".join(section.split())   # a line may end between the two
