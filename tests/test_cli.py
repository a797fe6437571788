"""The command line as a user meets it: exit codes, messages, JSON, nothing heavy for --help."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import parser


def turnout(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['turnout', '--help']\nfrom flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'lightning', 'evaluate', 'duckdb'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_every_command_is_listed() -> None:
    assert all(name in parser().format_help() for name in ("run", "ui", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "generation.samples=0"], 1, "generation.samples: Input should be greater than 0"),
        (["run", "--config", "embeded"], 1, "Did you mean 'embedded'"),
        (["rum"], 2, "invalid choice: 'rum'"),
        ([], 2, "required"),
    ],
)
def test_mistakes_get_a_message_and_a_code(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    ended = turnout(*arguments, cwd=tmp_path)
    assert ended.returncode == code
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_doctor_reports_as_json_and_says_what_to_do(tmp_path: Path, store_directory: Path) -> None:
    overrides = [f"store.directory={store_directory}"]
    well = turnout("doctor", "--json", *overrides, cwd=tmp_path)
    assert well.returncode == 0, well.stdout + well.stderr
    assert {finding["what"] for finding in json.loads(well.stdout)} >= {"warehouse", "smollm2"}
    overrides.append(
        "llms.smollm2.endpoint={url: 'http://127.0.0.1:9/v1', api_key_env: NO_SUCH_KEY}"
    )
    ill = turnout("doctor", "--json", *overrides, cwd=tmp_path)
    assert ill.returncode == 1
    (finding,) = [found for found in json.loads(ill.stdout) if not found["ok"]]
    assert finding["remedy"] == "export NO_SUCH_KEY=…"
