"""The Python in the guides is run, block after block, as a reader would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.embedded import ensure_started
from tests.harness.procs import clean_env
from tests.migrate import postgres

GUIDES = Path(__file__).resolve().parents[2] / "docs" / "migrate"
_BLOCK = re.compile(r"^(?P<note><!-- test: compile only -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


def program(guide: Path) -> str:
    """The code of a guide that is to be run, with the lines where they are in the guide."""
    text, lines = guide.read_text(), ""
    for match in _BLOCK.finditer(text):
        compile(match["code"], str(guide), "exec")
        if not match["note"]:
            lines += "\n" * (text.count("\n", 0, match.start("code")) - lines.count("\n")) + match["code"]
    return lines


@pytest.mark.parametrize("name", sorted(path.name for path in GUIDES.glob("*.md") if path.name != "README.md"))
def test_guide(name: str, tmp_path: Path, sidecar_env: dict[str, str]) -> None:
    if name == "dapr-checkpointer.md":
        pytest.importorskip("msgpack")
        pytest.importorskip("ulid")
        if "DAPR_GRPC_PORT" not in sidecar_env:
            # Dapr's own client finds no sidecar inside a process by itself.
            sidecar = ensure_started()
            sidecar_env = {"DAPR_GRPC_PORT": str(sidecar.grpc_port), "DAPR_HTTP_PORT": str(sidecar.http_port)}
    if name != "postgres.md":
        return run(GUIDES / name, tmp_path, sidecar_env)
    pytest.importorskip("langgraph.checkpoint.postgres")
    if postgres.binaries() is None:
        pytest.skip("no PostgreSQL is installed")
    with postgres.server() as url:
        run(GUIDES / name, tmp_path, {**sidecar_env, "DATABASE_URL": url})


def run(guide: Path, folder: Path, env: dict[str, str]) -> None:
    code = program(guide)
    assert "assert" in code, "a guide shows what it promises"
    script = folder / f"{guide.stem.replace('-', '_')}.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], env=clean_env(env), cwd=folder, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr


def test_every_link_leads_somewhere() -> None:
    for guide in GUIDES.glob("*.md"):
        for link in re.findall(r"\]\(([^)]+\.md)\)", guide.read_text()):
            assert (guide.parent / link).exists(), f"{guide.name}: {link}"
