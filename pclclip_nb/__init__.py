"""Unsupervised re-identification with CLIP: pictures of individuals from several cameras in, identities out, no labels needed.

`import pclclip_nb as pcl` loads a name when it is first used, so it takes no time and no torch. `__init__.pyi` lists the names."""

__version__ = "0.1.0"

import inspect

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

    sources = [c for c in reversed(item.__mro__) if c.__module__.startswith(__name__)] if inspect.isclass(item) else [item]
    comments = {k: v for source in sources for k, v in docments(source, full=True).items() if v.get("docment")}
    returned = None if inspect.isclass(item) else comments.pop("return", None)
    text = [inspect.cleandoc(item.__doc__ or "")]
    if comments:
        text += ["", "Parameters", "----------"]
    for name, said in comments.items():
        default = said["default"] is not inspect.Parameter.empty and said["default"] is not None
        text.append(f"{name} : {_type(said['anno'])}" + (f", default {said['default']!r}" if default else ""))
        text.append(f"    {said['docment']}")
    if returned:
        text += ["", "Returns", "-------", _type(returned["anno"]), f"    {returned['docment']}"]
    item.__doc__ = "\n".join(text)
    return item


def _type(anno):
    if anno is inspect.Parameter.empty:
        return "any"
    return anno if isinstance(anno, str) else anno.__name__ if inspect.isclass(anno) else str(anno)
