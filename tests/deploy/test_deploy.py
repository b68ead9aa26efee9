"""What ``deploy/`` promises, as far as no container and no systemd is needed; ``make check`` lints the Dockerfile."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from tulle.cli.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVE = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
OPTIONS = {option for parameter in SERVE.params for option in parameter.opts}


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: the word and what follows it, joined where lines go on; comments are left out."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def last_stage() -> list[tuple[str, str]]:
    every = instructions()
    return every[max(i for i, (word, _) in enumerate(every) if word == "FROM") :]


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    copied = [p for word, rest in instructions() if word == "COPY" and "--from" not in rest for p in rest.split()[:-1]]
    assert [path for path in copied if not (ROOT / path).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"pyproject.toml", "CMakeLists.txt", "native", "src", project["readme"], *project["license-files"]} <= {
        *copied
    }
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").split("\n")
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore and allowed == {*copied}
    # Nothing that the repository holds under these folders is left out.
    patterns = [line.removeprefix("**/") for line in ignore if line.startswith("**/")]
    listed = subprocess.run(["git", "ls-files", "src", "native"], cwd=ROOT, capture_output=True, text=True, check=True)
    parts = {part for name in listed.stdout.splitlines() for part in name.split("/")}
    assert [part for part in parts if any(fnmatch.fnmatch(part, pattern) for pattern in patterns)] == []


def test_the_container_is_no_root_and_tells_its_health() -> None:
    stage = dict(last_stage())
    assert int(stage["USER"]) > 0
    assert "/health" in stage["HEALTHCHECK"] and "--start-period" in stage["HEALTHCHECK"]
    assert not {"gcc", "g++", "make"} & set(stage["RUN"].split())
    entry = yaml.safe_load(stage["ENTRYPOINT"])
    assert entry[:2] == ["tulle", "serve"]
    assert {word for word in entry if word.startswith("--")} <= OPTIONS


def directives() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "tulle.service").read_text("utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_the_service_starts_and_ends_as_the_server_wants() -> None:
    from tulle.serve.settings import load

    unit = directives()
    words = shlex.split(unit["ExecStart"][0])
    assert words[:2] == ["/opt/tulle/bin/tulle", "serve"]
    assert {word for word in words if word.startswith("--")} <= OPTIONS
    settings = load(DEPLOY / "tulle.yaml", {})
    assert settings.host == "127.0.0.1" and settings.drain_timeout < float(unit["TimeoutStopSec"][0])
    assert "localhost" in unit["IPAddressAllow"]


def test_systemd_knows_the_unit_and_finds_little_to_blame(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    unit = tmp_path / "tulle.service"
    # The program need not be there.
    unit.write_text((DEPLOY / "tulle.service").read_text("utf-8").replace("/opt/tulle/bin/tulle", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True, check=True
    )
    exposure = re.search(r"exposure level for tulle.service: ([\d.]+)", rated.stdout)
    assert exposure is not None and float(exposure[1]) <= 1.5


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_proxies_hold_no_stream_back(name: str) -> None:
    text = (DEPLOY / name).read_text("utf-8")
    assert re.search(r"^\s*(proxy_buffering off;|flush_interval -1)$", text, re.MULTILINE)
    assert "127.0.0.1:8080" in text
    # Braces match: a proxy refuses a file whose braces do not.
    code = re.sub(r"#.*|\{\w[\w.]*\}", "", text)
    assert code.count("{") == code.count("}")


def test_alerts_ask_for_metrics_that_the_server_has() -> None:
    from tulle.serve import metrics

    source = Path(metrics.__file__).read_text("utf-8")
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text("utf-8"))["groups"][0]["rules"]
    asked = {name for rule in rules for name in re.findall(r"\btulle_\w+", rule["expr"])}
    assert len(asked) >= 5
    # Prometheus' client adds these endings to counters and histograms.
    missing = [name for name in asked if f'"{re.sub("_(total|bucket)$", "", name)}"' not in source]
    assert missing == []
    scrape = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text("utf-8"))
    assert [(DEPLOY / file).is_file() for file in scrape["rule_files"]] == [True]
