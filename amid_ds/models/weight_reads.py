"""Weights that a module reads of its descendants, past the hooks of the module that owns them.

A mixer may hand `self.conv1d.weight` to a function, where others call `self.conv1d(x)`. ZeRO-3
gathers by module, before a module's forward, so such a weight would not be there. Which weights
these are is read off the source of the model's own classes: every attribute of an attribute of
`self` in `forward`, and in the methods that it names, that is a parameter of a descendant. So the
branches count that only a GPU, a fused kernel, training or a cache takes, and nothing need be run.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from amid_ds.models.experts import Shape
from amid_ds.models.shape import layers_of

# Of an attribute chain: an element of a list or a dict of modules, whichever.
_ANY = "[]"
# What may be asked of a weight that is not there: it is the same of a part of it.
_OF_A_PART = frozenset({"dtype", "device", "requires_grad", "is_cuda", "is_floating_point"})


class OutsideRead(NamedTuple):
    """A module and the parameters of its descendants that it may read itself."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


def outside_reads(model: nn.Module) -> list[OutsideRead]:
    """Every module of `model` that may read weights of its descendants, and these by their names.

    model: a causal LM on any device, sharded or not; nothing is run. What encloses the stack of
    layers does not count: a weight that it reads would stay gathered beside every layer.
    """
    found, layers = [], layers_of(model)
    for name, module in model.named_modules():
        if any(each is layers for each in module.modules()):
            continue
        read: dict[str, nn.Parameter] = {}
        for chain in _chains_read(module.__class__):
            read |= dict(_parameters_at(module, chain, f"{name}." if name else ""))
        if read:
            found.append(OutsideRead(name, module, read))
    return found


def expert_blocks(model: nn.Module, shape: Shape = lambda parameter: parameter.shape) -> list[str]:
    """Names of the modules that call those of a list as the data choose: experts that are modules.

    That is taken of a list of n modules beside a matrix onto n numbers, as models with code of
    their own have it. transformers' experts are stacked, in one module. shape: as for
    `expert_layers`.
    """
    return [name for name, block in model.named_modules() if any(
        len(child) > 1 and len(child) in _widths(block, child, shape)
        for child in block.children() if isinstance(child, nn.ModuleList))]


def _widths(block: nn.Module, besides: nn.Module, shape: Shape) -> set[int]:
    """The first dimensions of the matrices that the children of `block` own, but one of them."""
    shapes = [shape(parameter) for child in block.children() if child is not besides
              for parameter in child.parameters(recurse=False)]
    return {own[0] for own in shapes if len(own) == 2}


def _parameters_at(module: nn.Module, chain: tuple[str, ...], prefix: str
                   ) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of descendants on the way of `self.<chain>`; none where it is no way."""
    first, *rest = chain
    if not rest:
        return
    children = (list(module.named_children()) if first == _ANY
                else [(first, _attribute(module, first))])
    for name, child in children:
        if not isinstance(child, nn.Module):
            continue
        parameter = _attribute(child, rest[0])
        if isinstance(parameter, nn.Parameter):
            yield f"{prefix}{name}.{rest[0]}", parameter
        else:
            yield from _parameters_at(child, tuple(rest), f"{prefix}{name}.")


def _attribute(module: nn.Module, name: str) -> Any:
    """The attribute of a module; None where it has none, or one that cannot be read now."""
    try:
        return getattr(module, name, None)
    except Exception:
        # A property's own code may raise anything.
        return None


@functools.cache
def _chains_read(module_class: type) -> frozenset[tuple[str, ...]]:
    """Attribute chains from `self`, of two names or more, that forward may read."""
    methods = _methods_of(module_class)
    chains: set[tuple[str, ...]] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        for function in methods.get(waiting.pop(), ()):
            for chain in _chains_of(function):
                if len(chain) > 1:
                    chains.add(chain)
                if chain[0] in methods and chain[0] not in seen:
                    seen.add(chain[0])
                    waiting.append(chain[0])
    return frozenset(chains)


def _methods_of(module_class: type) -> dict[str, list[ast.FunctionDef]]:
    """The methods of a class and its bases below nn.Module, by name, as far as there is source."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in module_class.__mro__:
        if base in (nn.Module, object):
            continue
        for statement in _class_bodies(base.__module__).get(base.__qualname__, ()):
            if isinstance(statement, ast.FunctionDef):
                methods.setdefault(statement.name, []).append(statement)
    return methods


@functools.cache
def _class_bodies(module_name: str) -> dict[str, list[ast.stmt]]:
    """The bodies of a Python module's classes; {} where its source is not at hand."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {statement.name: statement.body for statement in tree.body
            if isinstance(statement, ast.ClassDef)}


def _chains_of(function: ast.FunctionDef) -> set[tuple[str, ...]]:
    """The longest attribute chains from `self` in a function, but what a part of a weight tells.

    After `conv = self.conv1d` those from `conv` are among them.
    """
    finder = _ChainFinder(function)
    for statement in function.body:
        finder.visit(statement)
    return {chain for chain in finder.chains if chain[-1] not in _OF_A_PART}


class _ChainFinder(ast.NodeVisitor):
    """Collects the longest attribute chains of a function, in the order of its text."""

    def __init__(self, function: ast.FunctionDef) -> None:
        arguments = function.args.args
        self.names: dict[str, tuple[str, ...]] = {arguments[0].arg: ()} if arguments else {}
        self.chains: set[tuple[str, ...]] = set()

    def visit_Assign(self, node: ast.Assign) -> None:
        """Follow a name that a chain is given to."""
        self.generic_visit(node)
        chain = self._chain(node.value)
        if chain and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.names[node.targets[0].id] = chain

    def visit_Attribute(self, node: ast.Attribute | ast.Subscript) -> None:
        """Collect the chain, and not its parts, but for what is in its last brackets."""
        chain = self._chain(node)
        if chain is None:
            self.generic_visit(node)
            return
        self.chains.add(chain)
        if isinstance(node, ast.Subscript):
            self.visit(node.slice)

    visit_Subscript = visit_Attribute

    def _chain(self, node: ast.AST) -> tuple[str, ...] | None:
        """`self.a[i].b` as (a, [], b); None where it does not begin at a name that is known."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            before, last = self._chain(node.value), node.attr
        elif isinstance(node, ast.Subscript):
            before, last = self._chain(node.value), _ANY
        else:
            return None
        return None if before is None else (*before, last)
