"""The real thing: kill -9 in stages 1, 2 and 3 and during saves. More kinds of kills by hand: tests/kill_resume.py."""

import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_in_the_same_bits(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "kill_resume.py"
    command = [sys.executable, str(script), "--rounds", "1", "--quick", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "are the same to the last bit" in done.stdout
    assert done.stdout.count(": killed") == 4
