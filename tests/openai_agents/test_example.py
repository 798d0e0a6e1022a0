from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.procs import clean_env

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.kill
@pytest.mark.timeout(180)
def test_the_support_desk_is_killed_twice_and_pays_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "support_desk.py"), "demo"],
        env=clean_env({"PYTHONPATH": str(REPOSITORY)}), cwd=tmp_path, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the promise held" in done.stdout
