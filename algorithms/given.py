"""Scores that an answer builds on by name: S is what the first parent's score returns, T the second's. So a language
model changes a long score without writing it again, which a small one cannot."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from autoprune.algorithms.grammar import GIVEN
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.reader import python
from autoprune.algorithms.scores import NATIVE
from autoprune.algorithms.vocabulary import STATISTICS


def givens(*scores: str) -> dict[str, str]:
    """By name, of the parents' scores in order, as many as there are names; none that is no program."""
    return {name: score for name, score in zip(GIVEN, scores, strict=False) if score not in NATIVE}


def in_full(source: str, given: Mapping[str, str]) -> str:
    """A score function in which the names of `given` stand for those scores, with their lines in place of the names.

    source: any Python; what is no function `score`, defines the names itself, or reads none of them is given back as
    it is. The lines keep their own names, which begin with that of the score, and what they read joins the parameters.
    """
    module = python(source)
    function = next((node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "score"), None)
    if function is None:
        return source
    names = {n.id: n.ctx for n in ast.walk(function) if isinstance(n, ast.Name)}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    listed = {argument.arg for argument in function.args.args}
    used = [name for name in given if name in names and name not in stored | listed]
    lines: list[ast.stmt] = []
    for name in used:
        program = parse(given[name])
        own, result = _renamed(program.source, f"{name.lower()}_")
        lines += own
        missing = [read for read in STATISTICS if read in program.reads and read not in listed]
        function.args.args += [ast.arg(read) for read in missing]
        listed |= set(missing)
        if isinstance(result, ast.Name):  # its own name will do
            function = _InPlace({name: result.id}).visit(function)
        elif sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(function)) == 1:
            function = _InPlace({name: result}).visit(function)
        else:
            lines.append(ast.Assign([ast.Name(f"{name.lower()}_", ast.Store())], result))
            function = _InPlace({name: f"{name.lower()}_"}).visit(function)
    if not used:
        return source
    if ast.get_docstring(function) is not None and len(function.body) > 1:
        del function.body[0]  # only in the first place is it no statement
    function.body = lines + function.body
    _drop_other_names(function)
    try:
        return ast.unparse(ast.fix_missing_locations(module))
    except ValueError as error:  # of a text that cannot be written again, such as some in f-strings
        raise LanguageError(f"not in the language: {error}") from None


class _InPlace(ast.NodeTransformer):
    """Puts names, or expressions, in the place of names."""

    def __init__(self, others: Mapping[str, str | ast.expr]) -> None:
        self._others = others

    def visit_Name(self, node: ast.Name) -> ast.expr:
        other = self._others.get(node.id, node)
        return ast.Name(other, node.ctx) if isinstance(other, str) else other


def _drop_other_names(function: ast.FunctionDef) -> None:
    """Lines such as `m0 = s_v1`, where neither name gets another value."""
    stores = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    for statement in list(function.body):
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=other)) if (
                stores.count(name) == 1 and stores.count(other) == 1 and other != name
            ):
                function.body.remove(statement)
                _InPlace({name: other}).visit(function)


def _renamed(source: str, prefix: str) -> tuple[list[ast.stmt], ast.expr]:
    """The lines of a canonical function whose locals have names of their own, and what it returns."""
    body = ast.parse(source).body[0].body
    stored = {n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id in stored - {"_"}:
                node.id = f"{prefix}{node.id}"
    return body[:-1], body[-1].value
