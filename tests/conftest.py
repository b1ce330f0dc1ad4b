"""Makes the flat files of the repository importable from the tests, wherever pytest is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
