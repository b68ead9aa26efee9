"""``make wheel``: a wheel in an empty environment, as a user gets it. Needs pip's index.

    python tests/install/check_wheel.py WHEEL FOLDER

Makes the environment FOLDER/venv, prints its size, and runs what must run there. Exits with 1 at the first failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from light_install import chatting_model, served

ROOT = Path(__file__).parents[2]
TOOLS = ("pip", "setuptools", "_distutils_hack", "distutils-precedence.pth")
"""What an empty environment begins with."""


def sizes(site_packages: Path) -> tuple[int, int]:
    """Bytes without byte code, and bytes of byte code."""
    plain = compiled = 0
    for file in site_packages.rglob("*"):
        top = file.relative_to(site_packages).parts[0]
        if file.is_file() and top.partition("-")[0] not in TOOLS:
            size = file.stat().st_size
            compiled += size * (file.suffix == ".pyc")
            plain += size * (file.suffix != ".pyc")
    return plain, compiled


def expect(condition: bool, what: str, shown: object = "") -> None:
    print(("ok    " if condition else "FAILS ") + what, flush=True)
    if not condition:
        sys.exit(f"{what}: {shown}")


def main() -> None:
    wheel, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    venv.create(folder / "venv", clear=True, with_pip=True)
    python, tulle = folder / "venv/bin/python", folder / "venv/bin/tulle"
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, wheel], check=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    where = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    plain, compiled = sizes(where)
    print(
        f"wheel {wheel.stat().st_size / 1e6:.1f} MB; installed {plain / 1e6:.1f} MB, and byte code {compiled / 1e6:.1f}"
    )
    absent = [name for name in ("torch", "transformers", "scipy", "matplotlib") if (where / name).exists()]
    expect(not absent, "no heavy library came along", absent)
    work = folder / "work"
    subprocess.run(["rm", "-rf", work], check=True)
    work.mkdir()
    model = str(chatting_model(work / "model"))

    def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [tulle, *arguments], cwd=work, env=environment, input=text, capture_output=True, text=True, check=False
        )

    found = run("generate", "reference", "-p", "def f(", "-n", "8")
    expect(found.returncode == 0 and found.stdout.startswith("def f("), "tulle generate", found.stderr)
    found = run("chat", model, "-n", "8", text="hello\n\n")
    expect(found.returncode == 0, "tulle chat", found.stderr)
    found = run("compress", "reference", "-r", "sparse50-w4", "-o", "out")
    expect(
        found.returncode == 2 and "pip install 'tulle[compress]'" in found.stderr and found.stderr.count("\n") == 1,
        "tulle compress says what it needs", found.stderr,
    )  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    code, answer = served([str(tulle)], model, work, environment)
    expect(answer["choices"][0]["message"]["role"] == "assistant", "tulle serve answers", answer)
    expect(code == 0, "tulle serve ends at SIGTERM", code)


if __name__ == "__main__":
    main()
