"""Undoes what an import of AITER's does to a process besides loading it.

==========================================  ===========================================================================
failed, it leaves its modules half loaded   taken out of ``sys.modules``
it puts its folders before all others in    taken out after a failure, else moved to the end: they hold modules with
``sys.path``, at every try                  names as common as ``core``, but AITER finds those it compiles there
failed, it leaves an import hook            taken out of ``sys.meta_path``
its logger gets a handler and stops         undone after a failure, as all that can be set of logging
passing messages on
it sets Dynamo's ``ignore_logger_methods``  undone always: torch takes the functions in it for names
==========================================  ===========================================================================

Modules of *other* packages that were loaded on the way are taken out, too, if none of them is of a package with
compiled modules. Else all of them stay, whole as they are. A second import of numpy in one process raises ImportError,
and one of Triton aborts the process (3.9: nanobind refuses to register its types twice): worse than any debris.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pathlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from fusionpasses import _aiter_files


@contextlib.contextmanager
def removed() -> Iterator[None]:
    """What an import in its body does to the process is undone: all if it raises, else what AITER does not need."""
    # AITER's first lines import it. Loaded before, its settings are known, and it is no trace of AITER's.
    import torch._dynamo.config as dynamo

    root = _aiter_files.package().root
    modules = dict(sys.modules)
    lists: tuple[list[Any], ...] = (sys.path, sys.meta_path, sys.path_hooks)
    entries = [list(each) for each in lists]
    settings = dynamo.get_config_copy()
    ignored = copy.copy(dynamo.ignore_logger_methods)
    loggers = _loggers()
    of_logging = logging.root.manager.disable, logging.getLoggerClass(), logging.getLogRecordFactory()
    names_of_levels = [(names, dict(names)) for names in (logging._levelToName, logging._nameToLevel)]
    try:
        yield
    except BaseException:
        _restore_modules(modules, root)
        logging.disable(of_logging[0])
        logging.setLoggerClass(of_logging[1])
        logging.setLogRecordFactory(of_logging[2])
        for names, known in names_of_levels:
            names.clear()
            names.update(known)  # type: ignore[arg-type]  # each with its own
        for each, before in zip(lists, entries, strict=True):
            each[:] = before
        _restore_loggers(loggers)
        now = dynamo.get_config_copy()
        for name, value in settings.items():
            if now[name] != value:
                setattr(dynamo, name, value)
        raise
    else:
        new = [entry for entry in dict.fromkeys(sys.path) if entry not in entries[0]]
        sys.path[:] = entries[0] + new
    finally:
        if dynamo.ignore_logger_methods != ignored:
            dynamo.ignore_logger_methods = ignored


def _restore_modules(before: Mapping[str, ModuleType], root: pathlib.Path | None) -> None:
    """Takes out the modules that were brought, and puts back those that were replaced."""
    new = {name: module for name, module in sys.modules.items() if name not in before}
    of_others = {name: module for name, module in new.items() if not _is_of_aiter(name, module, root)}
    compiled = {name.partition(".")[0] for name, module in sys.modules.items() if _is_compiled(module)}
    stay = of_others if any(name.partition(".")[0] in compiled for name in of_others) else {}
    for name, module in new.items():
        if name in stay:
            continue
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        # A submodule is an attribute of its parent, too.
        if parent in before and getattr(before[parent], child, None) is module:
            delattr(before[parent], child)
    sys.modules.update(before)


def _is_compiled(module: object) -> bool:
    """Is it an extension module? Few can be loaded twice."""
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    return isinstance(origin, str) and origin.endswith((".so", ".pyd", "built-in"))


def _is_of_aiter(name: str, module: object, root: pathlib.Path | None) -> bool:
    """Is it AITER's by name or by file, or a module made by hand, which no package brought?"""
    top = name.partition(".")[0]
    if top == "aiter":
        return True
    spec = getattr(module, "__spec__", None)
    files = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    if not files:
        # Made by hand: packages have such submodules (six.moves), and stay with them.
        return top == name or top not in sys.modules or _is_of_aiter(top, sys.modules[top], root)
    # aiter_meta, beside the package, holds the sources that AITER compiles.
    folders = () if root is None else (root.resolve(), root.resolve().parent / "aiter_meta")
    return any(pathlib.Path(file).resolve().is_relative_to(folder) for file in files for folder in folders)


_LoggerState = tuple[list[logging.Handler], list[Any], bool, int, bool]


def _loggers() -> dict[str, tuple[logging.Logger, _LoggerState]]:
    """Every logger by name, "" for the root, with what can be set of it."""
    everyone = {
        name: each for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)
    }
    return {
        name: (each, (list(each.handlers), list(each.filters), each.propagate, each.level, each.disabled))
        for name, each in {"": logging.root, **everyone}.items()
    }


def _restore_loggers(before: Mapping[str, tuple[logging.Logger, _LoggerState]]) -> None:
    untouched: _LoggerState = ([], [], True, logging.NOTSET, False)
    for name, (logger, now) in _loggers().items():
        # Loggers that are new may be those of other packages, whose modules stay. AITER's are aiter and AITER_TRITON.
        new = name not in before
        if new and name.partition(".")[0] in sys.modules:
            continue
        state = untouched if new else before[name][1]
        if now != state:
            logger.handlers[:], logger.filters[:], logger.propagate, _, logger.disabled = state
            logger.setLevel(state[3])  # not the attribute: loggers keep which levels are enabled
        # One that others are below of has to stay; it does nothing now.
        if new and not any(other.startswith(f"{name}.") for other in before):
            logging.root.manager.loggerDict.pop(name, None)
