"""Dispatch: exit codes, one line on standard error, late imports."""

from __future__ import annotations

import errno
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tulle.cli import common, main
from tulle.errors import UserError

COMMANDS = ("demo", "compress", "eval", "inspect", "export", "train")


def one_line(captured: str) -> str:
    (line,) = captured.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compress", "m"], "Missing option '--recipe' / '-r'"),
        (["eval", "m", "--nosuch"], "No such option: --nosuch"),
        (["nosuch"], "No such command 'nosuch'"),
        (["eval", "m", "--length", "many"], "--length"),
        (
            ["eval", "m", "--documents", "5:2"],
            "expected --documents as A:B with A < B, found '5:2'; try --documents 0:100",
        ),
        (["eval", "m", "--backend", "gpu"], "expected --backend torch or engine, found 'gpu'"),
        (["inspect", "."], "config.json"),
        (["eval", "./nosuch"], "expected a model folder"),
        (["eval", "owner/nosuch"], "owner/nosuch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(arguments) == 2
    captured = capsys.readouterr()
    assert expected in one_line(captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("expected a,\nfound b"), 2, "expected a, found b"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "expected space on the disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("a fault of ours"), 1, "--debug"),
        (PermissionError(errno.EACCES, "denied"), 1, "denied"),
    ],
)
def test_errors_of_a_command(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", failing)
    assert main.run(["eval"]) == code
    line = one_line(capsys.readouterr().err)
    assert line.startswith("tulle: ") and message in line


def test_debug_anywhere_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="expected a model folder"):
        main.run(["eval", "./nosuch", "--debug"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([command, "--help"]) == 0
    assert f"Example: tulle {command} " in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tulle 0.")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from tulle.cli.main import run; code = run(['--help']);"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("0:100", (0, 100)), ("200:", (200, sys.maxsize)), (":5", (0, 5))]
)
def test_ranges(text: str | None, expected: tuple[int, int] | None) -> None:
    assert common.parse_range(text) == expected


@pytest.mark.parametrize("text", ["", ":0", "3", "3:3", "a:b", "-4:2"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(UserError, match="--part as A:B"):
        common.parse_range(text, "--part")


def test_json_has_no_nan_and_is_written_whole(tmp_path: Path) -> None:
    common.write_json(tmp_path / "out.json", {"a": [float("inf"), 1.5], "b": (float("nan"),)})
    assert (tmp_path / "out.json").read_text() == '{\n  "a": [\n    null,\n    1.5\n  ],\n  "b": [\n    null\n  ]\n}\n'
    assert [f.name for f in tmp_path.iterdir()] == ["out.json"]


def test_json_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--json"):
        common.write_json(tmp_path / "no" / "out.json", {})


def test_a_line_now_and_then_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    with common.progress_bars() as progress:
        for second in range(200):
            now[0] = 100.0 + second
            progress(f"block {second // 10}", second, 200)
        progress.line("compress w8a8   35 s")
        now[0] += 20.0  # not yet
        progress("block 20", 199, 200)
    assert capsys.readouterr() == ("", """\
 15 %  block 3
 30 %  block 6
 45 %  block 9
 60 %  block 12
 75 %  block 15
 90 %  block 18
compress w8a8   35 s
""")  # fmt: skip


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress_bars(quiet=True) as progress:
        progress("stage", 1, 2)
        progress.line("a step")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_with_the_lines_above(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with common.progress_bars() as progress:
        progress("w8a8: block 3 of 6", 1, 4)
        progress.line("compress [w8a8]   35 s")
    text = terminal.getvalue()
    assert "w8a8: block 3 of 6" in text and "━" in text
    assert "compress [w8a8]   35 s\n" in text  # no markup
    assert re.search(r"\x1b\[2K", text.rpartition("35 s")[2])  # the bar is gone at the end
