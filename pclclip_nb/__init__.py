"""Unsupervised re-identification with CLIP: pictures of individuals from several cameras in, identities out, no labels needed.

`import pclclip_nb as pcl` loads a name when it is first used, so it takes no time and no torch. `__init__.pyi` lists the names."""

__version__ = "0.1.0"

import ast
import inspect
import textwrap

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name):
    return _with_arguments(_load(name))


def _with_arguments(item):
    "The same function or class; its docstring lists what the comments of its arguments say, in the sections of numpydoc"
    if not inspect.isroutine(item) and not inspect.isclass(item) or "\n---" in (item.__doc__ or ""):
        return item
    from fastcore.docments import docments

    for method in vars(item).values() if inspect.isclass(item) else ():
        if inspect.isfunction(method) and method.__doc__ and method.__name__[0] != "_":
            _with_arguments(method)

    sources = (
        [c for c in reversed(item.__mro__) if c.__module__.startswith(__name__)] if inspect.isclass(item) else [item]
    )
    comments = {k: v for source in sources for k, v in docments(source, full=True).items() if v.get("docment")}
    types = {k: v for source in sources for k, v in _written_types(source).items()}
    returned = None if inspect.isclass(item) else comments.pop("return", None)
    text = [inspect.cleandoc(item.__doc__ or "")]
    if comments:
        text += ["", "Parameters", "----------"]
    for name, said in comments.items():
        default = said["default"] is not inspect.Parameter.empty and said["default"] is not None
        text.append(f"{name} : {types.get(name, 'any')}" + (f", default {said['default']!r}" if default else ""))
        text.append(f"    {said['docment']}")
    if returned:
        text += ["", "Returns", "-------", types.get("return", "any"), f"    {returned['docment']}"]
    item.__doc__ = "\n".join(text)
    return item


def _written_types(item):
    "Annotation of each argument or field as the source has it: `ArrayLike`, not the union behind it"
    node = ast.parse(textwrap.dedent(inspect.getsource(item))).body[0]
    inits = [n for n in getattr(node, "body", ()) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    function = inits[0] if inits else node
    fields = [(n.target.id, n.annotation) for n in node.body if isinstance(n, ast.AnnAssign)]
    arguments = [
        a for part in ("posonlyargs", "args", "kwonlyargs") for a in getattr(getattr(function, "args", None), part, [])
    ]
    pairs = [*fields, *((a.arg, a.annotation) for a in arguments), ("return", getattr(function, "returns", None))]
    return {name: ast.unparse(annotation).strip("\"'") for name, annotation in pairs if annotation is not None}
