"""How the file is built: what it imports, the order of its sections, what it says of itself"""

import ast
import functools
import importlib
import inspect
import pathlib
import pickle
import re
import subprocess
import sys

import sheepsse
from conftest import HANG

MODULE = pathlib.Path(sheepsse.__file__)
SOURCE = MODULE.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# (\d+)\. (\w[\w ]*): ")


def run(code, *options):
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        check=True,
        timeout=HANG,
        cwd=MODULE.parent,
    ).stdout.decode()


def test_importing_it_imports_the_standard_library_and_requests_alone():
    code = """if 1:
        import requests, sys
        before = set(sys.modules)
        import sheepsse
        added = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(added))"""
    added = set(run(code).split()) - {"sheepsse"}
    standard = getattr(sys, "stdlib_module_names", None)
    if standard is None:  # before Python 3.10: what lies beside os.py
        home = pathlib.Path(ast.__file__).parent
        standard = {path.stem for path in home.iterdir()} | set(sys.builtin_module_names)
        standard |= {path.name.partition(".")[0] for path in (home / "lib-dynload").glob("*")}
    assert added <= set(standard) | {"requests", "urllib3"}


def test_importing_it_leaves_what_is_heavy_to_where_it_is_used():
    code = "import requests, sys; before = set(sys.modules); import sheepsse; print(*set(sys.modules) - before)"
    added = set(run(code).split())
    assert not added & {"argparse", "concurrent.futures", "decimal", "asyncio", "subprocess"}


@functools.lru_cache(None)
def sections():
    """(number, name, first line) of each banner, in the order of the file"""
    found = []
    for number, line in enumerate(SOURCE.splitlines(), 1):
        match = BANNER.match(line)
        if match:
            found.append((int(match.group(1)), match.group(2), number))
    return found


def section_of(line):
    return max((start, number) for number, _, start in sections() if start <= line)[1]


def test_the_sections_stand_in_order_and_the_tour_names_each():
    numbers = [number for number, _, _ in sections()]
    assert numbers == sorted(numbers)
    assert len(numbers) == len(set(numbers)) >= 10
    for number, name, _ in sections():
        assert re.search(rf"^ +{number} +{name} ", sheepsse.__doc__, re.MULTILINE), name


def defined():
    """The section in which each module-level name is defined"""
    names = {}
    for node in TREE.body:
        if node.lineno < sections()[0][2]:  # imports, and what the module itself is asked for
            continue
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = section_of(node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update({target.id: section_of(node.lineno) for target in targets if isinstance(target, ast.Name)})
    return names


class Uses(ast.NodeVisitor):
    """The module-level names that code refers to when it runs: annotations are exempt"""

    def __init__(self):
        self.found = []
        self.local = [set()]

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and not any(node.id in names for names in self.local):
            self.found.append((node.id, node.lineno))

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node):
        for part in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(part)
        inner = [inner for part in node.body for inner in ast.walk(part)]
        self.local.append(
            {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
            | {name.id for name in inner if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
        )
        for part in node.body:
            self.visit(part)
        self.local.pop()


def test_no_section_uses_a_later_one():
    names = defined()
    uses = Uses()
    uses.visit(TREE)
    assert [
        f"line {line}: section {section_of(line)} uses {name} of section {names[name]}"
        for name, line in uses.found
        if name in names and line > sections()[0][2] and names[name] > section_of(line)
    ] == []


def test_every_public_name_is_there_and_documented():
    assert sorted(sheepsse.__all__) == sorted(set(sheepsse.__all__))
    for name in sheepsse.__all__:
        value = getattr(sheepsse, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), name  # what a NamedTuple has without one
    public = {name for name in defined() if not name.startswith("_")}
    assert public == set(sheepsse.__all__)


def test_fields_are_documented_by_their_type_and_their_line():
    assert sheepsse.Chunk.finish_reason.__doc__ == (
        "str | None: why this choice ended, in the vendor's word; None before the end"
    )
    assert sheepsse.Chunk.text.__doc__ == "str"
    assert sheepsse.Chunk.model.__doc__ == "str: the id and the model of the answer, where the event names them"
    for name in sheepsse.__all__:
        value = getattr(sheepsse, name)
        if hasattr(value, "_fields"):
            listed = re.findall(r"^ *([a-z_, ]+): ", value.__doc__, re.MULTILINE)
            assert listed, name
            assert {field for line in listed for field in line.split(", ")} <= set(value._fields), name
            for field in value._fields:
                assert getattr(value, field).__doc__.startswith(value.__annotations__[field]), f"{name}.{field}"


def test_public_methods_are_documented():
    for name in sheepsse.__all__:
        value = getattr(sheepsse, name)
        if inspect.isclass(value):
            for method, member in vars(value).items():
                if not method.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    inherited = any(getattr(getattr(base, method, None), "__doc__", None) for base in value.__mro__[1:])
                    assert inspect.getdoc(member) or inherited, f"{name}.{method}"


def test_error_messages_have_no_final_period():
    for node in ast.walk(TREE):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = node.exc.args[0]
            last = message.values[-1] if isinstance(message, ast.JoinedStr) else message
            if isinstance(last, ast.Constant) and isinstance(last.value, str):
                assert not last.value.endswith("."), last.value


def test_it_can_be_imported_again_and_its_values_pickled():
    again = importlib.import_module("sheepsse")
    chunk = again.Chunk(text="a", tool_calls=(again.ToolCall(0, "i", "n", "{}"),), usage=again.Usage(1, 2, 3))
    assert pickle.loads(pickle.dumps(chunk)) == chunk


def test_it_compiles_without_a_warning():
    assert run(f"import ast, pathlib; ast.parse(pathlib.Path({str(MODULE)!r}).read_text('utf-8')); print(1)", "-Werror")
