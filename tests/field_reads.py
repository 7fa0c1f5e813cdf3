"""Which settings does code read? A small type inference over source files, for test_architecture.py.

`x.lr` reads `optimizer.lr` only if x is known to be that section: a parameter, an attribute or a result annotated
with the section's class or reached from one (`config.optimizer`, `self.optimizer = optimizer`). It errs to one side:
a read may be missed where nothing is annotated, but what it reports is a read, whatever else in the code has an
attribute called `lr`.

Terms: a *kind* is the dotted name of a class of this repository, such as "neox_native.config.sections.model.Model".
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

CONFIG = "neox_native.config"
SCHEMA = f"{CONFIG}.schema"
Scope = dict[str, str | None]


class Code:
    """All modules, by dotted name, and what is known of their classes and functions."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.trees = {module: ast.parse(source) for module, source in sources.items()}
        self.names = {module: self._names(module, tree) for module, tree in self.trees.items()}
        self.attributes: dict[str, dict[str, str]] = defaultdict(dict)  # class -> attribute or method -> kind
        self.returns: dict[str, str] = {}  # function -> kind
        self.reads: set[tuple[str, str, str]] = set()  # (module, class, attribute) of each read of a known kind
        for _ in range(3):  # an attribute may be set from an attribute that a later module tells of
            for module, tree in self.trees.items():
                Reader(self, module).visit(tree)

    @staticmethod
    def _names(module: str, tree: ast.Module) -> dict[str, str]:
        """What the module's global names mean, as dotted names."""
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ClassDef | ast.FunctionDef):
                names[node.name] = f"{module}.{node.name}"
        return names

    def home(self, dotted: str) -> str:
        """Where a name is defined that a module passes on: "config.schema.Model" -> "config.sections.model.Model"."""
        module, _, name = dotted.rpartition(".")
        there = self.names.get(module, {}).get(name, dotted)
        return dotted if there == dotted else self.home(there)

    def is_class(self, dotted: str) -> bool:
        module, _, name = dotted.rpartition(".")
        tree = self.trees.get(module)
        return tree is not None and any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


class Reader(ast.NodeVisitor):
    """One walk through one module in source order; a function's scope starts as a copy of the scope around it."""

    def __init__(self, code: Code, module: str) -> None:
        self.code, self.module, self.names = code, module, code.names[module]
        self.scope: Scope = {}
        self.owner: str | None = None  # the class whose body we are in

    def dotted(self, node: ast.expr | None) -> str | None:
        """The dotted name that a name or `module.name` means."""
        if isinstance(node, ast.Name):
            return self.code.home(self.names.get(node.id, "")) or None
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return self.code.home(f"{base}.{node.attr}") if base else None
        return None

    def annotated(self, node: ast.expr | None) -> str | None:
        """The kind that an annotation names, alone or in a union."""
        if isinstance(node, ast.BinOp):
            return self.annotated(node.left) or self.annotated(node.right)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotated(ast.parse(node.value, mode="eval").body)
        dotted = self.dotted(node)
        return dotted if dotted and self.code.is_class(dotted) else None

    def kind(self, node: ast.expr) -> str | None:
        """The kind of an expression's value."""
        match node:
            case ast.Name(id=name):
                return self.scope.get(name)
            case ast.Attribute(value=base, attr=name):
                return self.code.attributes.get(self.kind(base) or "", {}).get(name)
            case ast.IfExp(body=one, orelse=other) | ast.BoolOp(values=[one, *_, other]):
                return self.kind(one) or self.kind(other)
            case ast.NamedExpr(value=value):
                return self.kind(value)
            case ast.Call(func=function, args=arguments):
                dotted = self.dotted(function) or ""
                if dotted.endswith("dataclasses.replace") and arguments:
                    return self.kind(arguments[0])
                known = dotted if self.code.is_class(dotted) else self.code.returns.get(dotted)
                return known or (self.kind(function) if isinstance(function, ast.Attribute) else None)
        return None

    def bind(self, target: ast.expr, kind: str | None) -> None:
        if isinstance(target, ast.Name):
            self.scope[target.id] = kind
            if self.owner and kind:
                self.code.attributes[self.owner][target.id] = kind
        elif isinstance(target, ast.Attribute) and kind and (owner := self.kind(target.value)):
            self.code.attributes[owner][target.attr] = kind

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=False):
                    self.bind(part, self.kind(value))
            else:
                self.bind(target, self.kind(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.annotated(node.annotation))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.kind(node.value))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and (owner := self.kind(node.value)):
            self.code.reads.add((self.module, owner, node.attr))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer = self.owner, self.scope
        self.owner, self.scope = f"{self.module}.{node.name}", {}
        self.generic_visit(node)
        self.owner, self.scope = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if result := self.annotated(node.returns):
            if self.owner:
                self.code.attributes[self.owner][node.name] = result
            else:
                self.code.returns[f"{self.module}.{node.name}"] = result
        self._visit_scope(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_scope(node)

    def _visit_scope(self, node: ast.FunctionDef | ast.Lambda) -> None:
        outer = self.owner, self.scope
        self.scope = dict(self.scope)
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scope |= {parameter.arg: self.annotated(parameter.annotation) for parameter in parameters}
        if self.owner and parameters and parameters[0].arg == "self":
            self.scope["self"] = self.owner
        self.owner = None
        self.generic_visit(node)
        self.owner, self.scope = outer


def reads_in(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(section, field) of every setting that the modules outside CONFIG read: to check a setting is not to use it.

    sources maps dotted module names to source text and contains SCHEMA, whose sections' properties count for the fields
    they use once they are read themselves.
    """
    code = Code(sources)
    sections = {kind: section for section, kind in code.attributes[f"{SCHEMA}.Config"].items()}
    uses: dict[tuple[str, str], set[tuple[str, str]]] = {}  # property -> what its body reads
    for kind in sections:
        module, _, name = kind.rpartition(".")
        (owner,) = (node for node in code.trees[module].body if isinstance(node, ast.ClassDef) and node.name == name)
        for function in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
            uses[kind, function.name] = {
                (kind, node.attr)
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            }
    found: set[tuple[str, str]] = set()
    pending = {(kind, name) for module, kind, name in code.reads if not module.startswith(CONFIG)}
    while pending:
        found |= pending
        pending = {field for read in pending for field in uses.get(read, ())} - found
    return {(sections[kind], name) for kind, name in found if kind in sections}


def fields_read(paths: Iterable[Path], root: Path) -> set[tuple[str, str]]:
    """`reads_in` of the files."""
    return reads_in(
        {".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}
    )
