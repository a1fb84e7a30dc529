"""Follow one method of a class through its source, with some facts given, and list the calls it makes.

A small interpreter for the shape of code that ms-swift's sync has: a condition that the facts decide is followed one
way, any other both ways; a loop runs once; a generator runs where it is made. Nothing of ms-swift is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Union

FunctionNode = Union[ast.FunctionDef, ast.AsyncFunctionDef]
UNKNOWN: Any = object()
NO_NAMES: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Call:
    name: str  # last part: self.model.merge_adapter() is 'merge_adapter'
    where: tuple[str, ...]  # the functions it was called in, outermost first
    dropped: bool  # a statement of its own: nobody looks at the answer


def find_class(tree: ast.Module, name: str) -> ast.ClassDef:
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    assert found, f"no class {name}"
    return found[0]


def methods_of(cls: ast.ClassDef) -> dict[str, FunctionNode]:
    return {node.name: node for node in cls.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def calls_of(tree: ast.Module, cls: str, method: str, facts: Mapping[str, Any]) -> list[Call]:
    """The calls that `method` of `cls` makes, its own helpers followed.

    `facts` maps expressions as written ('self.rollout_enable_lora', 'args.sleep_level') to their values.
    """
    walk = _Walk(methods_of(find_class(tree, cls)), facts)
    try:
        walk.function(walk.methods[method], ())
    except _Raised:
        pass
    return walk.calls


class _Returned(Exception):
    pass


class _Raised(Exception):
    pass


class _LeftLoop(Exception):
    pass


class _Walk:
    def __init__(self, methods: dict[str, FunctionNode], facts: Mapping[str, Any]) -> None:
        self.methods = methods
        self.facts = facts
        self.calls: list[Call] = []

    def function(self, node: FunctionNode, where: tuple[str, ...], outer: Mapping[str, Any] = NO_NAMES) -> Any:
        if node.name in where:
            return UNKNOWN
        try:
            self.block(node.body, dict(outer), (*where, node.name))
        except _Returned as returned:
            return returned.args[0]
        return None

    def block(self, body: list[ast.stmt], names: dict[str, Any], where: tuple[str, ...]) -> None:
        for statement in body:
            self.statement(statement, names, where)

    def statement(self, node: ast.stmt, names: dict[str, Any], where: tuple[str, ...]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node.name] = node
        elif isinstance(node, ast.If):
            test = self.value(node.test, names, where)
            if test is not UNKNOWN:
                self.block(node.body if test else node.orelse, names, where)
                return
            for branch in (node.body, node.orelse):
                try:
                    self.block(branch, names, where)
                except (_Returned, _Raised, _LeftLoop):
                    pass
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            self.value(node.test if isinstance(node, ast.While) else node.iter, names, where)
            try:
                self.block(node.body, names, where)
            except _LeftLoop:
                pass
            self.block(node.orelse, names, where)
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                self.value(item.context_expr, names, where)
            self.block(node.body, names, where)
        elif isinstance(node, ast.Try):
            try:
                self.block(node.body, names, where)
                self.block(node.orelse, names, where)
            finally:
                self.block(node.finalbody, names, where)
        elif isinstance(node, ast.Return):
            raise _Returned(self.value(node.value, names, where) if node.value else None)
        elif isinstance(node, ast.Raise):
            raise _Raised
        elif isinstance(node, (ast.Break, ast.Continue)):
            raise _LeftLoop
        elif isinstance(node, ast.Assign):
            value = self.value(node.value, names, where)
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = value
        elif isinstance(node, ast.Expr):
            self.value(node.value, names, where, dropped=True)
        else:
            self.inside(node, names, where)

    def inside(self, node: ast.AST, names: dict[str, Any], where: tuple[str, ...]) -> Any:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child, names, where)
            else:
                self.inside(child, names, where)
        return UNKNOWN

    def value(self, node: ast.expr, names: dict[str, Any], where: tuple[str, ...], dropped: bool = False) -> Any:
        """What an expression is worth, UNKNOWN if the facts do not say; calls in it are recorded."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, (ast.Name, ast.Attribute, ast.Call)):
            written = ast.unparse(node)
            fact = self.facts.get(written, self.facts.get(written.replace("self.args.", "args."), UNKNOWN))
            if fact is not UNKNOWN:
                return fact
        if isinstance(node, ast.Await):
            return self.value(node.value, names, where, dropped)
        if isinstance(node, ast.BoolOp):
            return self.bool_op(node, names, where)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            operand = self.value(node.operand, names, where)
            return UNKNOWN if operand is UNKNOWN else not operand
        if isinstance(node, ast.IfExp):
            test = self.value(node.test, names, where)
            if test is not UNKNOWN:
                return self.value(node.body if test else node.orelse, names, where)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return self.compare(node, names, where)
        if isinstance(node, ast.Call):
            return self.call(node, names, where, dropped)
        of_self = _attribute_of_self(node)
        if of_self in self.methods and _is_property(self.methods[of_self]):
            return self.function(self.methods[of_self], where)
        return self.inside(node, names, where)

    def bool_op(self, node: ast.BoolOp, names: dict[str, Any], where: tuple[str, ...]) -> Any:
        decides = isinstance(node.op, ast.Or)
        unknown = False
        value: Any = not decides
        for operand in node.values:
            value = self.value(operand, names, where)
            if value is UNKNOWN:
                unknown = True
            elif bool(value) is decides:
                return value
        return UNKNOWN if unknown else value

    def compare(self, node: ast.Compare, names: dict[str, Any], where: tuple[str, ...]) -> Any:
        left = self.value(node.left, names, where)
        right = self.value(node.comparators[0], names, where)
        op = node.ops[0]
        if isinstance(op, (ast.In, ast.NotIn)) and right == []:
            return isinstance(op, ast.NotIn)
        if left is UNKNOWN or right is UNKNOWN:
            return UNKNOWN
        if isinstance(op, (ast.Eq, ast.NotEq)):
            return (left == right) is isinstance(op, ast.Eq)
        if isinstance(op, (ast.Is, ast.IsNot)):
            return (left is right) is isinstance(op, ast.Is)
        return UNKNOWN

    def call(self, node: ast.Call, names: dict[str, Any], where: tuple[str, ...], dropped: bool) -> Any:
        func = node.func
        arguments = [self.value(argument, names, where) for argument in node.args]
        for keyword in node.keywords:
            self.value(keyword.value, names, where)
        if isinstance(func, ast.Attribute):
            name = func.attr
            self.value(func.value, names, where)
        else:
            name = func.id if isinstance(func, ast.Name) else ""
        self.calls.append(Call(name, where, dropped))
        if _attribute_of_self(func) in self.methods:
            return self.function(self.methods[name], where)
        local = names.get(name) if isinstance(func, ast.Name) else None
        if isinstance(local, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return self.function(local, where, names)
        return arguments[0] if name == "list" and arguments == [[]] else UNKNOWN


def _attribute_of_self(node: ast.expr) -> str:
    """'name' for self.name, '' for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return ""


def _is_property(node: FunctionNode) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
