"""Makes the flat files of the repository importable from the tests, wherever pytest is started."""
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"     # the tests' tensors are tiny; subprocesses inherit it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def signals_of_pytest():
    """A training that ended with an error leaves its handlers behind; Ctrl-C is pytest's again."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_unconfigure():
    """Readers that a failed test still holds ignore SIGTERM, so pytest would wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
