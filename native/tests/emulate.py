"""Runs a static Linux program on an emulated CPU with AMX, one that this machine need not have.

`make amx` runs the linears' test by it, whose AMX kernel and probe had otherwise never met a tile. The CPU is Bochs's
Sapphire Rapids. Its read-only memory, made here, holds emulate.c, which answers the program's system calls, and the
program. The program's clock advances a nanosecond an instruction (and a turn of a repeated one), so that a program
that times itself counts instructions. Tiles are at hand from the start, where Linux lends them to who asks: that the
program asks is answered, not enforced.

    python emulate.py BOCHS SYSTEM PROGRAM [ARGUMENT]...

BOCHS is a Bochs built with AMX, SYSTEM emulate.c as a static program. The exit status is PROGRAM's.
"""

import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

MIB, PAGE = 1 << 20, 1 << 12
# Memory, mapped where it lies: the system's, of no use to the program; the program's stack; its code, data and heap;
# and what it maps. At the end of 4 GiB the read-only memory. GIVEN and where ROM starts also stand in emulate.c.
SYSTEM_END, STACK_END, MAPPINGS, END = 2 * MIB, 4 * MIB, 128 * MIB, 512 * MIB
TABLES, GIVEN = 0x1000, 0x7000
ROM, ROM_END = (4096 - 2) * MIB, 4096 * MIB

SETTINGS = """
display_library: nogui
cpu: model=sapphire_rapids, ips=500000000, reset_on_triple_fault=0
clock: sync=none
memory: guest=512, host=512
pci: enabled=0
romimage: file={folder}/rom
vgaromimage: file={folder}/none
port_e9_hack: enabled=1
boot: disk
log: {folder}/log
panic: action=fatal
"""


class Program(NamedTuple):
    """An ELF file: its first instruction, what lies where, where that ends, and what the C library asks about it."""

    entry: int
    pieces: list[tuple[int, bytes]]
    end: int
    auxiliary: list[int]


def read(path: Path) -> Program:
    file = path.read_bytes()
    kind, entry, table, entries = struct.unpack_from("<16xH6xQQ16xH", file)
    if file[:4] != b"\x7fELF" or kind != 2:
        raise SystemExit(f"{path}: expected a program linked with -static, found another file")
    pieces, end, headers = [], 0, 0
    for i in range(entries):
        kind, offset, at, stored, size = struct.unpack_from("<I4xQQ8xQQ", file, table + 56 * i)
        if kind == 1:
            pieces.append((at, file[offset : offset + stored]))
            end = max(end, at + size)
            if offset <= table < offset + stored:
                headers = at + table - offset
    return Program(entry, pieces, end, [3, headers, 4, 56, 5, entries, 6, PAGE, 9, entry, 23, 0])


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def stack(arguments: list[str], auxiliary: list[int]) -> tuple[int, bytes]:
    """What Linux hands to a program, and where."""
    texts = [argument.encode() + b"\0" for argument in arguments]
    at = STACK_END - sum(map(len, texts)) - 16
    auxiliary = [*auxiliary, 25, STACK_END - 16, 0, 0]  # 16 random bytes
    pointers = [at + sum(map(len, texts[:i])) for i in range(len(texts))]
    values = words(len(pointers), *pointers, 0, 0, *auxiliary)
    start = (at - len(values)) // 16 * 16
    return start, values.ljust(at - start, b"\0") + b"".join(texts) + bytes(16)


def read_only_memory(system: Program, program: Program, arguments: list[str]) -> bytes:
    start, found = stack(arguments, program.auxiliary)
    pages = words(0x83, *(page | 0x87 for page in range(SYSTEM_END, END, 2 * MIB)))
    tables = words(TABLES + PAGE | 7).ljust(PAGE, b"\0") + words(TABLES + 2 * PAGE | 7).ljust(PAGE, b"\0") + pages
    given = words(TABLES, program.entry, start, (program.end + PAGE - 1) // PAGE * PAGE, MAPPINGS, END)
    rom = bytearray()
    pieces = [piece for piece in system.pieces if piece[0] < ROM]
    for at, data in [*pieces, *program.pieces, (TABLES, tables), (GIVEN, given), (start, found)]:
        data += bytes(-len(data) % 4)
        rom += struct.pack("<II", at, len(data) // 4) + data
    rom += struct.pack("<II", system.entry, 0)
    if len(rom) > ROM_END - ROM - PAGE:
        raise SystemExit(f"expected a program of at most {ROM_END - ROM - PAGE} bytes, found {len(rom)}")
    rom += bytes(ROM_END - ROM - len(rom))
    for at, data in system.pieces:
        if at >= ROM:
            rom[at - ROM : at - ROM + len(data)] = data
    return bytes(rom)


def main() -> int:
    bochs, system, program, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rom = read_only_memory(read(Path(system)), read(Path(program)), [program, *arguments])
        (folder / "rom").write_bytes(rom)
        (folder / "none").write_bytes(bytes(2048))
        (folder / "settings").write_text(SETTINGS.format(folder=folder))
        command = [bochs, "-q", "-f", str(folder / "settings")]
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        text, _, status = ran.stdout.partition(b"\0")[2].partition(b"\0")
        print(text.decode(), end="")
        if not status:
            log = folder / "log"
            print(ran.stderr.decode(), log.read_text()[-6000:] if log.exists() else "", file=sys.stderr)
    return status[0] if status else 255


if __name__ == "__main__":
    sys.exit(main())
