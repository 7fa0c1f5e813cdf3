"""The promises about the code itself: imports point down, files and functions stay short, every setting is read."""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from neox_native.config.settings import SETTINGS
from tests.field_reads import SCHEMA, fields_read, reads_in

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "neox_native"
LAYERS = [
    {"errors", "units", "dtypes", "fixed_point", "hashes"},
    {"plain_files", "options"},
    {"config"},
    {"durable", "launch"},
    {"mesh", "model", "data"},
    {"parallel", "zero", "optim"},
    {"engine", "checkpoint", "metrics", "reliability"},
    {"interop", "plan"},
    {"inference"},
    {"evaluation", "train"},
    {"commands", "compare"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FREE_OF_DISTRIBUTED = [
    "config",
    "model",
    "data/order.py",
    "data/indexed.py",
    "zero/layout.py",
    "optim/schedule.py",
    "parallel/cuts.py",
    "parallel/stages.py",
    "plan/shares.py",
    "plan/kept.py",
    "plan/memory.py",
    "plan/costs.py",
    "plan/remedies.py",
    "plan/speed.py",
]
TOP_LEVEL = {"README.md", "LICENSE", "pyproject.toml", "train.py", "neox_native", "configs", "tools", "tests"}
ANATOMY = {"gated", "kv_heads", "num_kv_heads", "attention_bias", "mlp_bias", "parallel_residual", "ffn_size"}
"""What is inside a layer kind."""
MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60
LINES_OF_A_SCREEN = 60


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in [*found, ROOT / "train.py"] if path.is_file()]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that the file imports, wherever in it, and of the names it takes from them."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of_package(dotted: str) -> str | None:
    """The folder or file directly in the package that a dotted name lies in: "neox_native.zero.layout" -> "zero". None for
    what lies elsewhere, or in the package's own `__init__.py`, which imports nothing of it."""
    package, _, rest = dotted.partition(".")
    part = rest.partition(".")[0]
    is_part = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
    return part if package == "neox_native" and part and is_part else None


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__"} <= set(LAYER)


def test_imports_point_down() -> None:
    wrong = []
    for path in sources("neox_native"):
        here = part_of_package(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for dotted in imported(path):
            there = part_of_package(dotted)
            if path != ROOT / "train.py" and there not in (None, here) and not LAYER[there] < LAYER[here]:
                wrong.append(f"{path.relative_to(ROOT)} ({here}) imports {dotted} ({there})")
    assert not wrong, "\n".join(wrong)


def test_only_the_model_knows_what_is_inside_a_layer() -> None:
    """Everybody else reads cards and costs."""
    inside = [PACKAGE / "config", PACKAGE / "model", PACKAGE / "interop"]
    wrong = [
        f"{path.relative_to(ROOT)} line {node.lineno} reads {name}"
        for path in sources("neox_native", "tools")
        if not any(path.is_relative_to(folder) for folder in inside)
        for node in ast.walk(parsed(path))
        if (name := getattr(node, "attr", getattr(node, "value", None))) in ANATOMY
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_imports_no_tool_and_no_test() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {dotted}"
        for path in sources("neox_native")
        for dotted in imported(path)
        if dotted.split(".")[0] in ("tools", "tests", "train")
    ]
    assert not wrong, "\n".join(wrong)


def test_arithmetic_does_not_communicate() -> None:
    wrong = []
    for place in FREE_OF_DISTRIBUTED:
        files = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
        for path in filter(Path.is_file, files):
            used = {*imported(path), *(ast.unparse(n) for n in ast.walk(parsed(path)) if isinstance(n, ast.Attribute))}
            wrong += [f"{path.relative_to(ROOT)} uses {name}" for name in used if name.startswith("torch.distributed")]
    assert not wrong, "\n".join(wrong)


def test_only_the_launch_reads_the_launchers_variables() -> None:
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    wrong = [
        f"{path.relative_to(ROOT)} line {node.lineno} says {node.value!r}"
        for path in sources("neox_native", "tools")
        if path != PACKAGE / "launch.py"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert not wrong, "\n".join(wrong)


def test_types_are_listed_and_microbatches_counted_in_one_place() -> None:
    wrong = []
    for path in sources("neox_native", "tools"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Dict) and path != PACKAGE / "dtypes.py":
                if {"fp32", "bf16"} <= {key.value for key in node.keys if isinstance(key, ast.Constant)}:
                    wrong.append(f"{path.relative_to(ROOT)} line {node.lineno} lists types of numbers: read dtypes.py")
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.FloorDiv) and not path.is_relative_to(PACKAGE / "config"):
                if {"global_batch_size", "micro_batch_size"} <= set(re.findall(r"\w+", ast.unparse(node))):
                    wrong.append(f"{path.relative_to(ROOT)} line {node.lineno} counts microbatches: ask training.num_microbatches")
    assert not wrong, "\n".join(wrong)


def test_axes_are_asked_for_by_purpose() -> None:
    wrong = []
    for path in sources("neox_native", "tools"):
        for node in ast.walk(parsed(path)) if path != PACKAGE / "mesh.py" else ():
            asked = node.slice if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("mesh") else None
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("get_group", "get_local_rank")) and node.args:
                asked = node.args[0]
            if isinstance(asked, ast.Constant) and asked.value in ("pp", "dp", "tp"):
                wrong.append(f"{path.relative_to(ROOT)} line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_training_takes_from_the_planner_in_three_places() -> None:
    """The prediction in the log, the dry run that a flag asks for, and what to change when memory has run out."""
    users = {path.name for path in sources("neox_native/train") if any(".plan." in dotted for dotted in imported(path))}
    assert users == {"report.py", "main.py", "out_of_memory.py"}


def test_one_file_makes_what_is_written_durable() -> None:
    owned = {"os.fsync", "os.replace", "os.rename", "os.link", "fcntl.flock"}
    wrong = []
    for path in sources("neox_native", "tools"):
        calls = [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
        for call in calls if path != PACKAGE / "durable.py" and "benchmarks" not in path.parts else ():
            name = ast.unparse(call)
            if name in owned or isinstance(call, ast.Attribute) and call.attr == "rename" and name != "super().rename":
                wrong.append(f"{path.relative_to(ROOT)} line {call.lineno} calls {name}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources("neox_native", "tools", "tests")
    }
    wrong = [f"{path.relative_to(ROOT)}: {lines}" for path, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE]
    assert not wrong, "\n".join(wrong)


def test_functions_are_short() -> None:
    wrong = []
    for path in sources("neox_native", "tools", "tests"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION:
                    wrong.append(f"{path.relative_to(ROOT)} {node.name}: {lines}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["train.py", "neox_native/train/main.py"])
def test_train_fits_one_screen(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= LINES_OF_A_SCREEN


def test_the_top_level_holds_nothing_else() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    names = [path.name for path in ROOT.iterdir() if not path.name.startswith(".")]
    found = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert found <= TOP_LEVEL


def test_a_read_counts_for_its_own_section_alone() -> None:
    schema = """
class Optimizer:
    lr: float
    eps: float
class Model:
    lr: float
    width: int
    depth: int
    @property
    def size(self) -> int:
        return self.width
    @property
    def volume(self) -> int:
        return self.size * 2
class Config:
    optimizer: Optimizer
    model: Model
"""
    user = f"""
from {SCHEMA} import Config, Model as Shape
class Other:
    lr = 1
class Holder:
    def __init__(self, config: Config | None, other: Other):
        self.shape = config.model
        print(other.lr, anything.eps)
def holder() -> Holder: ...
def use(optimizer, shape: Shape):
    print(optimizer.lr, shape.volume, holder().shape.lr)
    shape.depth = 3
"""
    assert reads_in({SCHEMA: schema, "user": user}) == {
        ("model", "width"),
        ("model", "size"),
        ("model", "volume"),
        ("model", "lr"),
    }


def test_every_setting_is_read() -> None:
    read = fields_read(sources("neox_native", "tools"), ROOT)
    unread = [dotted for dotted, setting in SETTINGS.items() if (setting.section, setting.name) not in read]
    assert not unread, (
        f"no code outside config/ reads {unread}, as far as annotations show: "
        "annotate the parameter or the attribute that holds the section"
    )
