"""The gin edge: files and overrides in, frozen configurations out; the only file that imports gin.

A name that nothing reads is an error here, and so is every value that a configuration refuses: `CallerError`, in one
line that names what was typed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util  # gin 0.5.0 uses importlib.util without importing it
import inspect
import logging
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.config.check import CallerError, one_line, require

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Of a file, where none is near what was typed.
SHOWN_MACROS = 8
DYNAMIC_REGISTRATION = "from __gin__ import dynamic_registration"


def build_run(gin_files: Sequence[str], overrides: Sequence[str] = (), search_paths: Sequence[str] = ()) -> tuple:
    """Returns (`RunConfig`, operative gin text) of a run file; raises on macros and overrides that nothing reads."""
    import gin

    from gpt4moe.config.run import RunConfig

    _parse(gin_files, overrides, search_paths)
    config = _construct(RunConfig, gin_files)
    _refuse_unread(_names(overrides), _is_operative)
    return config, gin.operative_config_str()


def build_sweep(gin_files: Sequence[str], overrides: Sequence[str] = (), search_paths: Sequence[str] = ()) -> tuple:
    """Returns (`SweepConfig`, build) of a run file that binds a sweep; `build` makes a run of further overrides."""
    from gpt4moe.config.run import RunConfig
    from gpt4moe.config.sweep import SweepConfig

    _parse(gin_files, overrides, search_paths)
    config = _construct(SweepConfig, gin_files)
    _construct(RunConfig, gin_files)
    _refuse_unread(_names(overrides), _is_operative)
    return config, functools.partial(_build_cell, tuple(gin_files), tuple(overrides), tuple(search_paths))


def _build_cell(
    gin_files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str], further: Sequence[str]
) -> tuple:
    import gin

    from gpt4moe.config.run import RunConfig

    _parse(gin_files, (*overrides, *further), search_paths)
    config = _construct(RunConfig, gin_files)
    _refuse_unread(_names(further), _is_operative)  # those of the whole sweep may be read by `SweepConfig` alone
    return config, gin.operative_config_str()


def build_compile(
    gin_files: Sequence[str],
    overrides: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    topology: str | None = None,
    slices: int | None = None,
) -> tuple:
    """Returns (`RunConfig`, `CompileConfig`) of a run file; `topology` and `slices` go before what the file binds."""
    from gpt4moe.config.compile import CompileConfig
    from gpt4moe.config.run import RunConfig

    _parse(gin_files, overrides, search_paths)
    run = _construct(RunConfig, gin_files)
    config = _construct(CompileConfig, gin_files) if _is_bound(CompileConfig) else CompileConfig()
    _refuse_unread(_names(overrides), _is_operative)
    given = {name: value for name, value in (("topology", topology), ("slices", slices)) if value is not None}
    return run, dataclasses.replace(config, **given)


def build_model(gin_files: Sequence[str], overrides: Sequence[str] = (), search_paths: Sequence[str] = ()):
    """Returns the `ModelConfig` of a model file, or of the run file that includes one."""
    from gpt4moe.config.model import ModelConfig

    _parse(gin_files, overrides, search_paths)
    config = _construct(ModelConfig, gin_files)
    _refuse_unread(_names(overrides), _is_referenced)
    return config


def build_parts(gin_files: Sequence[str], overrides: Sequence[str] = (), search_paths: Sequence[str] = ()) -> tuple:
    """Returns (`ModelConfig`, `OptimizerConfig`, `DataConfig`) of a run file; of a model file the others are None.

    Paths that the file leaves to its user (`DATA_PATHS`) need not be given.
    """
    import gin

    from gpt4moe.config.data import DataConfig
    from gpt4moe.config.optimizer import OptimizerConfig

    model = build_model(gin_files, overrides, search_paths)
    optimizer = _construct(OptimizerConfig, gin_files) if _is_bound(OptimizerConfig) else None
    for name in _macros():
        if name.endswith("PATHS") and gin.query_parameter(f"{name}/gin.macro.value") == ():
            gin.bind_parameter(f"{name}/gin.macro.value", (name,))
    return model, optimizer, _construct(DataConfig, gin_files) if _is_bound(DataConfig, "sources") else None


def saved_run(workdir: str | os.PathLike) -> tuple:
    """Returns (`RunConfig`, operative gin text) of a work directory; raises where it holds no run."""
    from etils import epath

    saved = epath.Path(os.fspath(workdir)) / "config.gin"
    require(saved.exists(), "--workdir", os.fspath(workdir), "holds no run (no config.gin)", "train there first")
    with tempfile.TemporaryDirectory() as folder:  # gin opens local files only
        local = pathlib.Path(folder) / "config.gin"
        local.write_text(saved.read_text())
        return build_run([str(local)])


def _parse(gin_files: Sequence[str], overrides: Sequence[str], search_paths: Sequence[str]) -> None:
    import gin

    require(bool(gin_files), "--gin_file", None, "must be given", "e.g. --gin_file=gin_configs/run/quickstart.gin")
    gin.clear_config()
    del gin.config._FILE_READERS[
        1:
    ]  # the reader of packages fails at folders without __init__.py, such as experiments/
    for path in (*search_paths, os.getcwd(), str(ROOT)):
        if path not in gin.config._LOCATION_PREFIXES:
            gin.add_config_file_search_path(path)
        if path not in sys.path:  # the user's own routers, sources and optimizers are imported from there
            sys.path.append(path)
    logging.getLogger().addFilter(_not_gin_search)
    for gin_file in gin_files:
        try:
            gin.parse_config_file(gin_file)
        except Exception as error:
            raise CallerError(f"--gin_file={gin_file}: {one_line(error)}") from error
    referenced = _referenced(gin_files)
    _refuse_unread(_macros(), lambda name: name in referenced)
    for override in overrides:
        _parse_override(gin, override)


def _referenced(gin_files: Sequence[str]) -> set[str]:
    """Macros that these files or what they include refer to, also where a later binding took the reference's place."""
    import gin

    names, waiting, seen = set(), list(gin_files), set()
    while waiting:
        name = waiting.pop()
        paths = (pathlib.Path(folder) / name for folder in gin.config._LOCATION_PREFIXES)
        path = next((path for path in paths if path.is_file()), None)
        if path is None or path in seen:
            continue
        seen.add(path)
        text = path.read_text()
        names.update(re.findall(r"%(\w+)", text))
        waiting += re.findall(r"""^\s*include\s+["']([^"']+)["']""", text, re.MULTILINE)
    return names


def _parse_override(gin, override: str) -> None:
    name, equals, value = override.partition("=")
    require(bool(equals and name), "--gin", override, "must have the form --gin.NAME=VALUE")
    try:
        gin.parse_config(f"{_imports(gin) if '@' in value else ''}{name} = {value}")
    except SyntaxError as error:
        mend = f"quote strings: --gin.{name}=\"'{value}'\""
        function = next((known for known in _functions(gin) if known.endswith(f".{value}")), None)
        mend = f"a function is named so: --gin.{name}=@{function}" if function else mend
        raise CallerError(f"--gin.{name}={value} is not a Python literal; {mend}") from error
    except Exception as error:
        unresolved = value.strip().startswith("@") and isinstance(error, (AttributeError, ValueError))
        said = f"names no function{_near_function(gin, value)}" if unresolved else f"{one_line(error)}{_near(name)}"
        if "not provided by an import" in said:
            said = f"names no module that a gin file imports, see docs/plugging_in.md{_near_function(gin, value)}"
        raise CallerError(f"--gin.{override} {said}") from error


def _near_function(gin, value: str) -> str:
    """`; did you mean ...?` with functions that an override may name."""
    module, _, name = value.strip().removeprefix("@").rpartition(".")
    functions = _functions(gin)
    same_name = [f"@{each}" for each in functions if each.rpartition(".")[2] == name]
    if same_name:
        return f"; did you mean {' or '.join(same_name)}?"
    known = [each.rpartition(".")[2] for each in functions if each.rpartition(".")[0] == module]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    listed = f"; there are {', '.join(known)}" if known else ""
    return f"; did you mean {' or '.join(f'@{module}.{each}' for each in close)}?" if close else listed


def _functions(gin) -> list[str]:
    """Public functions of the modules that an override may name, as `module.function`."""
    found = []
    for line in _imports(gin).splitlines():
        statement = re.fullmatch(r"from ([\w.]+) import (\w+)(?: as (\w+))?", line.strip())
        if statement and statement[1] != "__gin__":
            module = importlib.import_module(f"{statement[1]}.{statement[2]}")
            prefix = statement[3] or statement[2]
            found += [
                f"{prefix}.{name}" for name, value in vars(module).items() if _is_its_function(module, name, value)
            ]
    return sorted(found)


def _is_its_function(module, name: str, value: object) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")


def _imports(gin) -> str:
    """What the files import, and the library's routers: an override names functions as files do.

    Only where it names one: routers import JAX, and `inspect` answers at once without it.
    """
    imported = [statement.format() for statement in gin.config._IMPORTS]
    others = sorted({*imported, "from gpt4moe.model import routers"} - {DYNAMIC_REGISTRATION})
    return "\n".join((DYNAMIC_REGISTRATION, *others, ""))


def _construct(config_type: type, gin_files: Sequence[str]) -> Any:
    import gin

    mend = "bind sweep.SweepConfig, see docs/sweeps.md" if config_type.__name__ == "SweepConfig" else "give a run file"
    require(_is_bound(config_type), "--gin_file", ",".join(gin_files), f"has no {config_type.__name__}", mend)
    try:
        return _with_parameters(gin, gin.get_configurable(config_type)())
    except Exception as error:
        raise CallerError(one_line(error)) from error


def _with_parameters(gin, value: Any) -> Any:
    """The configuration with its functions given the parameters that gin binds to them.

    gin would look them up when a function is called, by then perhaps those of another configuration, and nothing that
    is saved or compared would know of them.
    """
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        bound = {name: _with_parameters(gin, item) for name, item in fields.items()}
        changed = {name: item for name, item in bound.items() if item is not fields[name]}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple):
        items = tuple(_with_parameters(gin, item) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if not inspect.isfunction(value):
        return value
    function = inspect.unwrap(value, stop=lambda each: each.__code__.co_filename != gin.config.__file__)
    selector, scopes = f"{value.__module__}.{value.__qualname__}", _scopes(value)
    bound = [(scope, selector) for scope in scopes if (scope, selector) in gin.config._CONFIG]
    if not bound:
        return function
    parameters = gin.get_bindings(f"{scopes[-1]}/{selector}".lstrip("/"))
    # They go into config.gin as they are bound there, macros by name, so that what is read again reads every macro.
    for key in bound:
        gin.config._OPERATIVE_CONFIG.setdefault(key, {}).update(gin.config._CONFIG[key])
    # A saved configuration binds them in another order, which is to make no other run.
    parameters = {name: _with_parameters(gin, each) for name, each in sorted(parameters.items())}
    return functools.update_wrapper(functools.partial(function, **parameters), function)


def _scopes(function: Callable) -> list[str]:
    """The scopes whose parameters a function of a configuration has: of `@a/b/draw` these are none, a and a/b."""
    components = inspect.getclosurevars(function).nonlocals.get("scope_components") or ()
    return ["/".join(components[:depth]) for depth in range(len(components) + 1)]


def _names(overrides: Sequence[str]) -> list[str]:
    return [override.partition("=")[0].strip() for override in overrides]


def _refuse_unread(names: Sequence[str], is_read: Callable[[str], bool]) -> None:
    """gin takes a misspelt macro for a new one that nothing uses, and says nothing: we refuse it."""
    for name in names:
        if not is_read(name):
            raise CallerError(f"{name} is set but read by nothing in this configuration{_near(name)}")


def _is_operative(name: str) -> bool:
    """Whether building the configuration used this macro or parameter."""
    import gin

    operative = gin.config._OPERATIVE_CONFIG
    if "." not in name:
        return (name, "gin.macro") in operative
    scoped, _, parameter = name.rpartition(".")
    scope, _, selector = scoped.rpartition("/")
    return any(
        parameter in values and used.endswith(selector) and used_scope == (scope or used_scope)
        for (used_scope, used), values in operative.items()
    )


def _is_referenced(name: str) -> bool:
    """Whether any binding of the gin files refers to this macro (an override may have cut it off since)."""
    import gin

    return "." in name or re.search(rf"%{re.escape(name)}\b", gin.config_str()) is not None


def _near(name: str) -> str:
    """`; did you mean ...?` with the macros and parameters whose names are near."""
    import gin

    macros = [macro for macro in _macros() if macro != name]
    known = set(macros)
    for _, selector in gin.config._CONFIG:
        config_type = _library_type(selector)
        fields = dataclasses.fields(config_type) if config_type else ()
        known.update(f"{selector.removeprefix('gpt4moe.config.')}.{field.name}" for field in fields)
    close = difflib.get_close_matches(name, sorted(known - {name}), n=2, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    nearest = difflib.get_close_matches(name, macros, n=SHOWN_MACROS, cutoff=0.0)
    more = len(macros) - len(nearest)
    return f"; known macros: {', '.join(nearest)}{f' and {more} others' if more else ''}"


def _library_type(selector: str) -> type | None:
    """The configuration class behind a gin selector; None for a macro or a function."""
    module, _, name = selector.rpartition(".")
    found = getattr(sys.modules[module], name) if module.startswith("gpt4moe.config.") else None
    return found if isinstance(found, type) else None


def _macros() -> list[str]:
    import gin

    return sorted(scope for scope, selector in gin.config._CONFIG if selector == "gin.macro")


def _is_bound(config_type: type, field: str | None = None) -> bool:
    """Whether a file binds the class, or this field of it."""
    import gin

    name = f"{config_type.__module__}.{config_type.__name__}"
    bound = (values for (_, selector), values in gin.config._CONFIG.items() if selector == name)
    return any(field is None or field in values for values in bound)


def _not_gin_search(record: logging.LogRecord) -> bool:
    """gin logs every folder in which a file was not found, before it raises the error that says so."""
    return not record.getMessage().startswith("Path not found")
