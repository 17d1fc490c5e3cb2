"""The files an evaluation leaves in its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = "results.json"  # scores by column, and lmms-eval's results in full
ROUTING = "routing.json"  # analysis.RoutingCounts
FORMAT = 1


def read_results(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What `libmoe-fast evaluate` left in `folder`; None if there is nothing, or another program's results.json."""
    try:
        content = json.loads((Path(folder) / RESULTS).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and content.get("format") == FORMAT and "scores" in content
    return content if ours else None
