"""The set-up's scripts (environments/) are no package: their folder is put on the path here, for these tests."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "environments"))
