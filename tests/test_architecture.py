"""Holds the house: every op has its room, floors are not crossed, and what must stand in one place stands in one place."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "transfuse"
_LISTS = dict(re.findall(r"^set\((OPS|FUSED_PARTS) ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.M))
OPS, FUSED_PARTS = (_LISTS[name].split() for name in ("OPS", "FUSED_PARTS"))

ROOMS = (
    "csrc/{op}.cpp",
    "kernels/cpu/{op}.h",
    "kernels/cpu/{op}.cpp",
    "kernels/cuda/{op}.cuh",
    "kernels/cuda/{op}.cu",
    "kernels/triton/{op}.py",
    "python/transfuse/ops/{op}.py",
    "python/transfuse/nn/{op}.py",
    "python/transfuse/reference/{op}.py",
    "tests/test_{op}.py",
    "bench/bench_{op}.py",
)
# Rooms that later issues build. The list only shrinks: a room that exists must not stand here.
NOT_YET_BUILT = {
    *(f"kernels/cuda/attention.{kind}" for kind in ("cu", "cuh")),
}

# Lower floors first. A module imports from lower floors only.
FLOORS = {"env": 0, "reference": 0, "kernels": 0, "extension": 1, "checks": 2, "dispatch": 2, "autograd": 2, "raw_ops": 2, "ops": 3, "nn": 4, "testing": 5,
          "sweeps": 6, "models": 6, "promises": 7, "bench": 8, "cli": 9}
# Siblings of one op: pages that stand beside attention's own.
SIBLINGS = {("varlen_attention", "attention"), ("attention", "attention_checks"), ("varlen_attention", "attention_checks"),
            ("layer_norm", "norm_checks"), ("rms_norm", "norm_checks"),
            ("decode_attention", "attention"), ("decode_attention", "attention_checks")}

# Pages of nn that belong to no one op, and why.
NN_WITHOUT_STEM = {
    "hooks": "when a module's call may be left out: what nn and models share",
    "transformer": "blocks of torch.nn that put attention, layer_norm and gelu together",
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("room", ROOMS)
def test_every_op_has_its_room(op, room):
    path = room.format(op=op)
    exists = (ROOT / path).is_file()
    assert exists != (path in NOT_YET_BUILT), f"{path} {'exists: take it off NOT_YET_BUILT' if exists else 'is missing'}"


@pytest.mark.parametrize("room", ["csrc/{part}.cpp", "python/transfuse/ops/{part}.py", "tests/test_{part}.py"])
@pytest.mark.parametrize("part", FUSED_PARTS)
def test_every_part_of_the_fused_layers_has_its_room(part, room):
    assert (ROOT / room.format(part=part)).is_file()


def test_every_page_of_nn_has_its_op():
    pages = {path.stem for path in (PACKAGE / "nn").glob("*.py")} - {"__init__", *OPS}
    assert pages == set(NN_WITHOUT_STEM)


def _imports(path):
    """(module, name) pairs of transfuse imports, wherever in the file they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "transfuse":
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "transfuse":
                    yield alias.name, None


def _floor_and_page(module, name):
    parts = module.split(".")[1:]
    if not parts:
        parts = [name] if name in FLOORS else []
    elif len(parts) == 1 and name and (PACKAGE / parts[0] / f"{name}.py").exists():
        parts.append(name)
    return (parts[0] if parts else None), (parts[1] if len(parts) > 1 else None)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_floors_are_not_crossed(path):
    relative = path.relative_to(PACKAGE)
    floor, page = relative.parts[0].removesuffix(".py"), relative.stem
    if floor not in FLOORS:
        pytest.skip("the package's front door")
    for module, name in _imports(path):
        other, other_page = _floor_and_page(module, name)
        if other is None:
            continue  # public names, allowed in the upper floors only
        assert other in FLOORS or other == "_C", f"{relative} imports {module}, which is on no floor"
        if other == "_C":
            assert floor in ("extension", "ops", "testing", "cli", "bench"), f"{relative} imports the compiled module"
        elif other != floor:
            assert FLOORS[other] < FLOORS[floor], f"{relative} ({floor}) imports from {other}, a floor that is not below"
        elif floor in ("ops", "reference", "nn") and other_page not in (None, page):
            allowed = (page, other_page) in SIBLINGS or page == "__init__" or floor == "nn"
            assert allowed, f"{relative} imports sideways from {other_page}"


@pytest.mark.parametrize("folder", ["kernels/cpu", "kernels/cuda"])
def test_kernels_know_no_framework(folder):
    for path in sorted((ROOT / folder).glob("*")):
        text = path.read_text()
        for name in re.findall(r'#\s*include\s*[<"]([^>"]+)', text):
            assert not name.startswith(("torch/", "ATen", "c10", "pybind11", "Python.h")), f"{path.name} includes {name}"
        assert not re.search(r"\b_mm\d*_|__m\d", text) or path.name.startswith("vec_"), f"{path.name}: intrinsics belong in vec_<level>.h"
        assert "std::vector" not in text or path.name == "isa.cpp", f"{path.name}: a std container is a weak symbol in every ISA object"


def _source_files():
    for folder in ("csrc", "kernels", "python", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                yield path


def test_one_place_each():
    """The environment, inline assembly and torch headers each have one home; unsafe arithmetic has none."""
    for path in _source_files():
        text, where = path.read_text(), path.relative_to(ROOT)
        if where.parts[0] == "python" and where.name != "env.py":
            assert not re.search(r"os\.(environ|getenv)", text), f"{where} reads the environment; env.py is the place"
        if where.parts[0] in ("csrc", "kernels") and where.name != "ptx.cuh":
            assert not re.search(r"\basm( volatile)?\b *\(", text), f"{where}: inline assembly outside ptx.cuh"
        if where.parts[0] != "tests":
            assert "fast" + "-math" not in text, f"{where}: unsafe arithmetic flag"
        if where.parts[0] in ("python", "kernels"):
            assert not re.search(r"^\s*(import|from) (pickle|subprocess|urllib|socket)\b", text, re.M), f"{where}: not allowed in what ships"
    assert "fast" + "-math" not in (ROOT / "CMakeLists.txt").read_text()


def test_no_room_is_too_large():
    for path in _source_files():
        lines = path.read_text().count("\n")
        assert lines <= 700, f"{path.relative_to(ROOT)} has {lines} lines: split it by meaning"


def test_no_weak_symbol_is_defined_by_two_isa_levels():
    """The linker keeps one copy of a weak symbol: an AVX-512 copy picked for every level would trap on an AVX2 machine."""
    objects = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/kernels_*.dir/**/*.o"))
    assert objects, "no ISA objects under build/: run make build"
    assert shutil.which("nm"), "nm is missing"
    owners = {}
    for path in objects:
        level = next(part for part in path.parts if part.startswith("kernels_")).removeprefix("kernels_").removesuffix(".dir")
        listing = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            kind, symbol = line.split()[-2:]
            if kind in "WVu":
                owners.setdefault(symbol, set()).add(level)
    shared = {symbol: levels for symbol, levels in owners.items() if len(levels) > 1}
    assert not shared, f"weak symbols defined by several ISA levels: {shared}"
