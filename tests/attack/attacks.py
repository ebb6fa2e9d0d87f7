"""What an attack may lead to, and how cases are drawn."""

import contextlib
import io
import os
import pathlib
import zlib

import numpy as np

NUMBER = int(os.environ.get("BPNJAX_ATTACKS", "0"))  # of cases per surface; 0: a few


def cases(surface, few):
    """Seeds of a surface's cases: the same ones in every session."""
    number = NUMBER or few
    start = zlib.crc32(surface.encode()) % 10_000
    return range(start, start + number)


def outcome(run, arguments):
    """Runs a command; its exit code and what it said. Whatever is raised is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    said = err.getvalue()
    assert code in (0, 1, 2), code
    assert "Traceback" not in said
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith("bpnjax: ")]
        assert lines and said.splitlines()[-1] == lines[-1], said
    return code, out.getvalue(), said


def damage(path, random):
    """Damages a file in one of some ways; returns which."""
    data = path.read_bytes()
    ways = ["cut", "emptied", "zeroed", "flipped", "deleted", "grown", "text"]
    way = ways[random.integers(len(ways))]
    if way == "cut":
        path.write_bytes(data[: random.integers(len(data) + 1)])
    elif way == "emptied":
        path.write_bytes(b"")
    elif way == "zeroed":
        start = int(random.integers(len(data) + 1))
        path.write_bytes(data[:start] + bytes(len(data) - start))
    elif way == "flipped" and data:
        changed = bytearray(data)
        place = int(random.integers(len(data)))
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(changed))
    elif way == "deleted":
        path.unlink()
    elif way == "grown":
        path.write_bytes(data + random.bytes(int(random.integers(1, 100))))
    else:
        path.write_text(random.choice(["null", "[]", "{}", "0", '"x"', "NaN", '{"a": [1, 2']))
    return way


def files_of(folder):
    return sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())


ODD_TEXTS = (
    "", " ", "None", "nan", "-1", "0", "1e400", "9" * 30, "(1,)", "()", "[", "ä", "a" * 300,
    "../x", "True", "x=y", "0,1;2", "-0.0", "1e-320", "*", "(", "\\", "%s", "{}", "0x10", "1_0",
    "inf",
)  # fmt: skip


def odd_array(random, shape):
    """An array of a dtype and content that nobody asked for."""
    kinds = ["f8", "f4", "i8", "i1", "u1", "u8", "bool", "c8", "U3", "M8[s]", "f2"]
    kind = kinds[random.integers(len(kinds))]
    whole = random.integers(-3, 300, shape)
    array = whole.astype(kind if kind not in ("i1", "u1", "bool") else "i8").astype(kind)
    if kind in ("f8", "f4", "f2") and random.random() < 0.4 and array.size:
        array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, -np.inf])
    return array
