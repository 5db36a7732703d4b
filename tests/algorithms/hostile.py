"""Sources that must be refused, each with a part of the reason that must be given.

Attacks as they are known from sandboxes of Python and from code that language models write, and what merely costs too
much. `body` sources stand inside `def score(W, x_norm):`.
"""

from __future__ import annotations


def body(*lines: str) -> str:
    return "def score(W, x_norm):\n" + "".join(f"    {line}\n" for line in lines)


def returns(expression: str) -> str:
    return body(f"return {expression}")


ONE_FUNCTION = "one of them or each once, and nothing beside them"
NO_EXPRESSION = "the expression "
NO_STATEMENT = "the statement "
NO_ATTRIBUTE = "attribute"
NO_CALL = "only tensor methods and functions written torch.NAME"
NOT_DEFINED = "is not defined"
NO_NAME = "is not in the language"
LITERAL = "a literal here is a number"
SIZE = "too large"
NOT_PYTHON = "not Python"
PARAMETERS = "expected `def score(W, …):`"

IMPORTS = {
    "import at the top": ("import os\n" + returns("W"), ONE_FUNCTION),
    "import beside torch": ("import torch, os\n" + returns("W"), ONE_FUNCTION),
    "import torch under another name": ("import torch as os\n" + returns("W"), ONE_FUNCTION),
    "import a part of torch": ("import torch.hub\n" + returns("W"), ONE_FUNCTION),
    "import from": ("from os import system\n" + returns("W"), ONE_FUNCTION),
    "import everything": ("from torch import *\n" + returns("W"), ONE_FUNCTION),
    "import from the future": ("from __future__ import annotations\n" + returns("W"), ONE_FUNCTION),
    "import inside": (body("import os", "return W"), NO_STATEMENT),
    "import torch inside": (body("import torch", "return W"), NO_STATEMENT),
    "import from inside": (body("from os import environ", "return W"), NO_STATEMENT),
    "__import__": (returns("__import__('os').getcwd()"), NO_NAME),
    "importlib": (returns("importlib.import_module('os')"), NO_NAME),
    "import by a loader": (returns("__loader__.load_module('os')"), NO_NAME),
    "import by a spec": (returns("__spec__.loader"), NO_ATTRIBUTE),
    "import by sys.modules": (returns("sys.modules['os']"), NO_ATTRIBUTE),
    "import by builtins": (returns("__builtins__['__import__']"), NOT_DEFINED),
    "import by torch's own": (returns("torch.os.system('true')"), NO_NAME),
    "import by torch.sys": (returns("torch.sys.modules"), NO_ATTRIBUTE),
    "import by importlib in torch": (returns("torch.importlib.import_module('os')"), NO_NAME),
}

DUNDERS = {
    "class": (returns("W.__class__"), NO_ATTRIBUTE),
    "subclasses": (returns("W.__class__.__base__.__subclasses__()"), NO_NAME),
    "mro": (returns("().__class__.__mro__[1]"), NO_ATTRIBUTE),
    "globals": (returns("W.abs.__globals__"), NO_ATTRIBUTE),
    "builtins by a function": (returns("torch.where.__self__"), NO_ATTRIBUTE),
    "code object": (returns("score.__code__"), NO_ATTRIBUTE),
    "own name": (returns("score(W, x_norm)"), NO_CALL),
    "dict": (returns("W.__dict__"), NO_ATTRIBUTE),
    "reduce": (returns("W.__reduce_ex__(4)"), NO_NAME),
    "setstate": (returns("W.__setstate__(x_norm)"), NO_NAME),
    "getattribute": (returns("W.__getattribute__('data')"), NO_NAME),
    "init": (returns("W.__init__()"), NO_NAME),
    "dunder as a name": (body("__class__ = W", "return __class__"), "cannot be assigned"),
    "dunder as a parameter": ("def score(W, __class__):\n    return W", "is not a statistic"),
    "dunder as a function": ("def __init__(W):\n    return W", ONE_FUNCTION),
    "module dunder": (returns("__name__"), NOT_DEFINED),
    "file": (returns("__file__"), NOT_DEFINED),
    "debug": (returns("__debug__"), NOT_DEFINED),
    "builtins as a name": (body("__builtins__ = W", "return W"), "cannot be assigned"),
    "matmul by a dunder": (returns("W.__matmul__(W)"), NO_NAME),
    "iadd by a dunder": (returns("W.__iadd__(1)"), NO_NAME),
}

REFLECTION = {
    "getattr": (returns("getattr(W, 'da' + 'ta')"), NO_CALL),
    "setattr": (body("setattr(W, 'data', x_norm)", "return W"), NO_STATEMENT),
    "delattr": (returns("delattr(W, 'data')"), NO_CALL),
    "hasattr": (returns("hasattr(W, 'data')"), NO_CALL),
    "vars": (returns("vars(W)"), NO_CALL),
    "dir": (returns("dir()"), NO_CALL),
    "globals call": (returns("globals()"), NO_CALL),
    "locals": (returns("locals()"), NO_CALL),
    "eval": (returns("eval('W')"), NO_CALL),
    "exec": (body("exec('a = 1')", "return W"), NO_STATEMENT),
    "compile": (returns("compile('W', '', 'eval')"), NO_CALL),
    "type": (returns("type('A', (), {})"), NO_CALL),
    "super": (returns("super()"), NO_CALL),
    "operator.attrgetter": (returns("operator.attrgetter('data')(W)"), NO_CALL),
    "map": (returns("map(abs, W)"), NO_CALL),
    "breakpoint": (returns("breakpoint()"), NO_CALL),
    "input": (returns("input()"), NO_CALL),
    "print": (returns("print(W)"), NO_CALL),
    "open": (returns("open('/etc/passwd')"), NO_CALL),
    "exit": (returns("exit(0)"), NO_CALL),
    "memoryview": (returns("memoryview(b'a')"), NO_CALL),
    "a call of a call": (returns("W.abs()()"), NO_CALL),
    "a call of a subscript": (returns("W[0]()"), NO_CALL),
    "range as a value": (returns("range"), NOT_DEFINED),
    "torch as a value": (returns("torch"), NOT_DEFINED),
    "torch in a subscript": (returns("torch['load']"), NOT_DEFINED),
}

STRINGS = {
    "format": (returns("'{0.__class__}'.format(W)"), NO_NAME),
    "f-string": (returns("f'{W.__class__}'"), NO_EXPRESSION),
    "f-string with a call": (returns("f'{open(1)}'"), NO_EXPRESSION),
    "percent": (returns("'%s' % W"), LITERAL),
    "bytes": (returns("b'a'"), LITERAL),
    "string as a factor": (returns("W * 'a'"), LITERAL),
    "string repeated": (returns("'a' * 1000000000"), LITERAL),
    "join": (returns("''.join(W)"), NO_NAME),
    "ellipsis": (returns("W[...]"), "expected an integer literal"),
    "complex": (returns("W * 1j"), LITERAL),
    "surrogates": (returns("W * '\ud800'"), NOT_PYTHON),
    "escape in a name": (returns("W.\\u0064ata"), NOT_PYTHON),
    "a warning of the compiler": (returns("1if W else 0"), NO_EXPRESSION),
    "null byte": (returns("W\0"), NOT_PYTHON),
    "coding cookie": ("# -*- coding: utf-7 -*-\n" + returns("+AFcALgBkAGEAdABh-"), NOT_PYTHON),
}

DEFINITIONS = {
    "decorator": ("@print\n" + returns("W"), PARAMETERS),
    "decorator with a call": ("@open('f')\n" + returns("W"), PARAMETERS),
    "decorator with a lambda": ("@lambda f: f\n" + returns("W"), PARAMETERS),
    "default argument": ("def score(W, x_norm=open('f')):\n    return W", PARAMETERS),
    "default of W": ("def score(W=1):\n    return W", PARAMETERS),
    "keyword-only default": ("def score(W, *, x_norm=print()):\n    return W", PARAMETERS),
    "keyword-only": ("def score(W, *, x_norm):\n    return W", PARAMETERS),
    "positional-only": ("def score(W, /):\n    return W", PARAMETERS),
    "starred": ("def score(W, *x_norm):\n    return W", PARAMETERS),
    "double-starred": ("def score(W, **x_norm):\n    return W", PARAMETERS),
    "async": ("async def score(W):\n    return W", ONE_FUNCTION),
    "lambda": ("score = lambda W: W", ONE_FUNCTION),
    "class": ("class score:\n    pass", ONE_FUNCTION),
    "class beside it": ("class A:\n    pass\n" + returns("W"), ONE_FUNCTION),
    "code beside it": (returns("W") + "print(1)\n", ONE_FUNCTION),
    "two functions": (returns("W") + returns("W"), ONE_FUNCTION),
    "function inside": (body("def f(a=print()):", "    return a", "return f()"), NO_STATEMENT),
    "lambda inside": (returns("(lambda: W)()"), NO_CALL),
    "class inside": (body("class A:", "    a = W", "return W"), NO_STATEMENT),
    "walrus": (returns("(y := W)"), NO_EXPRESSION),
    "yield": (body("yield W", "return W"), NO_STATEMENT),
    "yield as a value": (returns("(yield W)"), NO_EXPRESSION),
    "await": (returns("W.abs().sum(dim=0) + W[None, None][0, 0] if 1 else W"), NO_EXPRESSION),
    "global": (body("global W", "return x_norm"), NO_STATEMENT),
    "nonlocal": (body("nonlocal W", "return x_norm"), NO_STATEMENT),
    "delete": (body("del W", "return x_norm"), NO_STATEMENT),
    "comprehension": (returns("[w for w in W]"), NO_EXPRESSION),
    "generator": (returns("sum(w for w in W)"), NO_CALL),
    "dict of results": (returns("{'fitness': 0.0}"), NO_EXPRESSION),
    "tuple of results": (returns("(W, 0.0)"), NO_EXPRESSION),
    "starred result": (body("return *W,"), NO_EXPRESSION),
    "match": (body("match W:", "    case _:", "        a = W", "return W"), NO_STATEMENT),
    "try": (body("try:", "    a = W", "finally:", "    b = W", "return W"), NO_STATEMENT),
    "with": (body("with W as a:", "    b = a", "return W"), NO_STATEMENT),
    "assert": (body("assert W", "return W"), NO_STATEMENT),
    "raise": (body("raise W"), NO_STATEMENT),
    "annotation without a value": (body("a: print()", "return W.abs()"), NO_STATEMENT),
}

TORCH = {
    "torch.load": (returns("torch.load('model.bin')"), NO_NAME),
    "torch.save": (returns("torch.save(W, 'f')"), NO_NAME),
    "torch.ops": (returns("torch.ops.aten.relu_(W)"), NO_NAME),
    "torch.ops with an allowed name": (returns("torch.ops.aten.abs(W)"), "takes at most 1 arguments"),
    "torch.ops called on nothing": (returns("torch.ops.aten.abs()"), NO_ATTRIBUTE),
    "torch.hub": (returns("torch.hub.load('a', 'b')"), NO_NAME),
    "torch.classes": (returns("torch.classes.load_library('x')"), NO_NAME),
    "torch.jit": (returns("torch.jit.load('x')"), NO_NAME),
    "torch.utils": (returns("torch.utils.cpp_extension.load('x')"), NO_NAME),
    "torch.multiprocessing": (returns("torch.multiprocessing.spawn(W)"), NO_NAME),
    "torch.distributed": (returns("torch.distributed.init_process_group()"), NO_NAME),
    "torch.from_file": (returns("torch.from_file('x')"), NO_NAME),
    "torch.frombuffer": (returns("torch.frombuffer(W)"), NO_NAME),
    "torch.set_num_threads": (returns("torch.set_num_threads(1)"), NO_NAME),
    "torch.manual_seed": (returns("torch.manual_seed(0)"), NO_NAME),
    "numpy": (returns("W.numpy()"), NO_NAME),
    "data": (returns("W.data"), NO_ATTRIBUTE),
    "storage": (returns("W.untyped_storage()"), NO_NAME),
    "data_ptr": (returns("W.data_ptr()"), NO_NAME),
    "share_memory_": (returns("W.share_memory_()"), NO_NAME),
    "set_": (returns("W.set_(x_norm)"), NO_NAME),
    "apply_": (returns("W.apply_(abs)"), NO_NAME),
    "map_": (returns("W.map_(W, abs)"), NO_NAME),
    "register_hook": (returns("W.register_hook(print)"), NO_NAME),
    "backward": (returns("W.sum().backward()"), NO_NAME),
    "requires_grad_": (returns("W.requires_grad_()"), NO_NAME),
    "cuda": (returns("W.cuda()"), NO_NAME),
    "to": (returns("W.to('cuda')"), NO_NAME),
    "type of torch": (returns("W.type('torch.IntTensor')"), NO_NAME),
    "tolist": (returns("W.tolist()"), NO_NAME),
    "item": (returns("W.sum().item()"), NO_NAME),
    "grad": (returns("W.grad"), NO_ATTRIBUTE),
    "T": (returns("W.T"), NO_ATTRIBUTE),
    "shape": (returns("W.shape"), NO_ATTRIBUTE),
    "out=": (returns("torch.abs(W, out=W)"), "takes no further argument"),
    "dtype=": (returns("W.sum(dim=1, dtype=torch.float64)"), "takes no further argument"),
    "starred argument": (returns("torch.maximum(*W)"), NO_EXPRESSION),
    "double-starred argument": (returns("W.sum(**W)"), "takes no further argument"),
}

WRITES = {
    "in-place method": (returns("W.abs_()"), NO_NAME),
    "zero_": (returns("W.zero_()"), NO_NAME),
    "copy_": (returns("W.copy_(x_norm)"), NO_NAME),
    "item assignment": (body("W[0] = 1", "return W"), NO_STATEMENT),
    "slice assignment": (body("W[:] = x_norm", "return W"), NO_STATEMENT),
    "item assignment of a local": (body("a = W.abs()", "a[0, 0] = 1", "return a"), NO_STATEMENT),
    "augmented item": (body("W[0] += 1", "return W"), NO_STATEMENT),
    "attribute assignment": (body("W.data = x_norm", "return W"), NO_STATEMENT),
    "assignment to an input": (body("W = W.abs()", "return W"), "is an input and stays as it is"),
    "augmented input": (body("W += 1", "return W"), "is an input and stays as it is"),
    "loop variable over an input": (body("for W in range(2):", "    a = x_norm", "return W"), "already a name"),
    "assignment to torch": (body("torch = W", "return W"), "cannot be assigned"),
    "assignment to range": (body("range = W", "return W"), "cannot be assigned"),
    "chained assignment": (body("a = b = W", "return a"), NO_STATEMENT),
    "unpacking": (body("a, b = W, W", "return a"), NO_STATEMENT),
    "where in place": (returns("W.where_(W > 0, W)"), NO_NAME),
    "masked_fill_": (returns("W.masked_fill_(W > 0, 0)"), NO_NAME),
    "resize_": (returns("W.resize_(1000000, 1000000)"), NO_NAME),
}

ALLOCATIONS = {
    "ones": (returns("torch.ones(1000000, 1000000)"), NO_NAME),
    "zeros_like": (returns("torch.zeros_like(W)"), NO_NAME),
    "empty": (returns("torch.empty(1000000000000)"), NO_NAME),
    "arange": (returns("torch.arange(1000000000)"), NO_NAME),
    "repeat": (returns("W.repeat(1000, 1000)"), NO_NAME),
    "expand": (returns("W.expand(1000, -1, -1)"), NO_NAME),
    "tile": (returns("W.tile(9999)"), NO_NAME),
    "kron": (returns("torch.kron(W, W)"), NO_NAME),
    "outer product of a row": (returns("W + (x_norm[:, None] * x_norm[None, :]).sum()"), "larger than W"),
    "outer product of matrices": (returns("(W[:, None, :] * W[None, :, :]).sum(dim=0)"), "larger than W"),
    "a fourth dimension": (returns("(W[:, :, None, None] + W[None, None, :, :]).sum(dim=0).sum(dim=0)"), "larger"),
    "power of integers": (returns("W * 9 ** 9 ** 9 ** 9"), "9.0"),
    "long integer": (returns("W * " + "9" * 5000), "Exceeds the limit"),
    "shift": (returns("W * (1 << 1000000)"), "operator LShift"),
    "infinite literal": (returns("W * 1e999"), LITERAL),
    "huge literal": (returns("W * 1e300"), LITERAL),
}

RECURSION = {
    "parentheses": (returns("(" * 300 + "W" + ")" * 300), NOT_PYTHON),
    "minuses": (returns("-" * 9000 + "W"), "nested too deeply"),
    "brackets": (returns("[" * 4000 + "]" * 4000), NOT_PYTHON),
    "sums": (returns("W" + " + W" * 2000), SIZE),
    "calls": (returns("W" + ".abs()" * 100), SIZE),
    "subscripts": (returns("W" + "[0]" * 500), SIZE),
    "unclosed": (returns("(" * 150), NOT_PYTHON),
    "attributes": (returns("W" + ".a" * 3000), "nested too deeply"),
    "nested calls": (returns("torch.abs(" * 60 + "W" + ")" * 60), SIZE),
    "comparisons": (returns("W" + " < W" * 50), NO_EXPRESSION),
    "nested loops": (
        body("for _ in range(8):", "    for _ in range(8):", "        a = W", "return W"),
        "not in a loop",
    ),
    "many statements": (body(*[f"a{i} = W" for i in range(600)], "return W"), SIZE),
    "long line": (returns("W  " + "#" * 9_000_000), "characters"),
    "10 MB of spaces": (" " * 10_000_000 + returns("W"), "characters"),
    "10 MB of lines": ("\n" * 10_000_000 + returns("W"), "characters"),
    "10 MB of brackets": ("(" * 10_000_000, "characters"),
    "10 MB of a name": ("def score(W):\n    return " + "a" * 10_000_000, "characters"),
    "indentation": ("def score(W):\n" + "\n".join(" " * i + "if W:" for i in range(1, 120)), NOT_PYTHON),
    "a long name": (returns("a" * 9000), "'aaaa"),
}

TIME = {
    "while": (body("while True:", "    a = W", "return W"), NO_STATEMENT),
    "a loop over a tensor": (body("for w in W:", "    a = w", "return W"), "a loop is `for _ in range(N)`"),
    "a long loop": (body("for _ in range(1000000000):", "    a = W", "return W"), "a loop takes 1 to"),
    "a loop of computed length": (body("for _ in range(W.sum()):", "    a = W", "return W"), "a loop is"),
    "a loop with else": (body("for _ in range(2):", "    a = W", "else:", "    b = W", "return W"), "a loop is"),
    "an empty loop": (body("for _ in range(0):", "    a = W", "return W"), "a loop takes 1 to"),
    "time.sleep": (returns("time.sleep(100)"), NO_NAME),
    "recursion": (body("a = score(W, x_norm)", "return a"), NO_CALL),
    "svd": (returns("torch.linalg.svd(W)"), NO_NAME),
    "matrix product": (returns("W @ W"), "in `return W @ W`"),
    "inverse": (returns("torch.inverse(W)"), NO_NAME),
    "quadratic blow-up": (
        body("a = W.abs()", "for _ in range(8):", *["    a = (a + a * a).sqrt()"] * 100, "return a"),
        "too large",
    ),
    "a loop of many operations": (
        body("a = W.abs()", "for _ in range(8):", *["    a = (a + a * a).sqrt()"] * 30, "return a"),
        "operations are run",
    ),
    "values held": (
        body(*[f"a{i} = W * {i}" for i in range(40)], "return " + " + ".join(f"a{i}" for i in range(30))),
        "at a time",
    ),
}

LOOK_ALIKES = {
    "Cyrillic letter": (returns("W.аbs()"), NO_NAME),  # noqa: RUF001
    "full-width name": (returns("W.ｎｕｍｐｙ()"), NO_NAME),
    "full-width torch": (returns("ｔｏｒｃｈ.load('x')"), NO_NAME),
    "full-width dunder": (returns("W.＿＿class＿＿"), NOT_PYTHON),
    "ligature": (returns("W.ﬁll_(0)"), NO_NAME),
    "mathematical letters": (body("𝐚𝐛𝐜 = W", "return 𝐝𝐚𝐭𝐚"), NOT_DEFINED),
    "bidirectional override": (body("a = W  # \u202e x_norm = a", "return \u202eW"), NOT_PYTHON),
    "zero-width space": (returns("W\u200b"), NOT_PYTHON),
    "non-breaking space": (returns("W\u00a0+ W"), NOT_PYTHON),
    "line separator": (returns("W\u2028import os"), NOT_PYTHON),
    "form feed": ("\x0cimport os\n" + returns("W"), ONE_FUNCTION),
    "carriage returns": ("def score(W, x_norm):\r    import os\r    return W", NO_STATEMENT),
    "semicolon": (body("a = W; import os; return a"), NO_STATEMENT),
    "backslash": (body("a = W", "\\", "import os", "return a"), NO_STATEMENT),
    "comment that ends": ("def score(W):\n    # harmless \r    import os\n    return W", NO_STATEMENT),
}

VALUES = {
    "not a number": (returns("(W * 0) / (W * 0)"), "not finite"),
    "infinite": (returns("W.abs() / (x_norm * 0)"), "not finite"),
    "logarithm of negatives": (returns("W.log()"), "not finite"),
    "root of negatives": (returns("W.sqrt()"), "not finite"),
    "overflow": (returns("(W * 1e9) ** 9"), "not finite"),
    "constant": (returns("W * 0"), "nothing is ranked"),
    "constant rows": (returns("W.abs().mean(dim=1, keepdim=True) + W * 0"), "nothing is ranked"),
    "a number": (returns("0.5"), "returned a float"),
    "a row": (returns("x_norm"), "expected float32"),
    "a column": (returns("W.sum(dim=1, keepdim=True)"), "expected float32"),
    "a mask": (returns("W > 0"), "returned bool"),
    "wrong dimensions": (returns("x_norm[:, None] * W"), "in `return"),
}

HOSTILE: dict[str, tuple[str, str]] = {
    f"{family}: {name}": case
    for family, cases in {
        "imports": IMPORTS,
        "dunders": DUNDERS,
        "reflection": REFLECTION,
        "strings": STRINGS,
        "definitions": DEFINITIONS,
        "torch": TORCH,
        "writes": WRITES,
        "allocations": ALLOCATIONS,
        "recursion": RECURSION,
        "time": TIME,
        "look-alikes": LOOK_ALIKES,
        "values": VALUES,
    }.items()
    for name, case in cases.items()
}
