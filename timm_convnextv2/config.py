"""Options as frozen dataclasses. A field holds default, limits and help text; a command's config nests its parts.

    @dataclass(frozen=True)
    class Schedule:
        epochs: int = option(800, "passes over the images", at_least=1)

    @dataclass(frozen=True)
    class PretrainConfig:
        schedule: Schedule = part(Schedule, "schedule")

    add_options(parser, PretrainConfig)
    given = words_given(parser, argv)                       # {'epochs': 5}: only what argv sets
    config = build(PretrainConfig, read_yaml(PretrainConfig, path), given)  # later layers win; values are checked
    resolved = evolve(config, lr=1e-3)                      # a second value; the first never changes
    flat(resolved)                                          # {'epochs': 5, 'lr': 0.001}, as args.yaml records it

Plain dataclasses, because options have timm's conventions: flat names over nested parts, `--no-x`, `K=V` words, a flat
YAML file. tyro and simple-parsing prefix nested names, jsonargparse has a YAML layout of its own.
"""

import argparse
import ast
import json
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from operator import ge, gt, le
from pathlib import Path
from typing import Any, TypeVar

from .console import CommandParser, Faults, closest

C = TypeVar("C")
MODEL = "atto to huge, a name of timm, the folder of a run or model, local-dir:FOLDER or hf-hub:USER/NAME"


@dataclass(frozen=True)
class Option:
    """Properties of an option besides its type and default."""

    help: str = ""  # for `--help`; the default is appended unless the text has one
    short: str = ""  # short form, such as '-b'
    metavar: str | tuple[str, ...] | None = None
    choices: Sequence[Any] | None = None
    at_least: float | None = None  # inclusive limits, for each value of a sequence
    at_most: float | None = None
    above: float | None = None  # exclusive lower limit
    parse: Callable[[str], Any] | None = None  # converts a word; by default the field's type
    const: Any = None  # value of the option without a word, which makes the word optional
    positional: bool = False
    words: str = ""  # metavar of the option's values as words after the command, without its flag
    negatable: bool = False  # a switch that is off by default also has --no-x, to undo what a file sets
    recorded: bool = True  # `flat` includes it; False for options of one call, such as --resume


def option(default: Any, help: str, **more: Any) -> Any:
    """A field that is an option of the command line; `...` as default makes it required, a function is called for it.

    See `Option`.
    """
    metadata = {"option": Option(help, **more)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=MISSING if default is ... else default, kw_only=default is ..., metadata=metadata)


def default_device() -> str:
    """'cuda' if there is a GPU, else 'cpu'."""
    import torch  # options are read without it

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_option() -> Any:
    """The option --device, whose default is looked up when a config is made."""
    return option(default_device, "where the model runs (default: cuda if there is one, else cpu)", metavar="NAME")


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_option(help: str) -> Any:
    """The option --workers, with a default of 4 but at most one process per core."""
    return option(
        lambda: min(4, usable_cores()), f"{help} (default: 4, but at most one per core)", short="-j", metavar="N",
        at_least=0,
    )  # fmt: skip


def part(cls: type, title: str = "") -> Any:
    """A field that holds another dataclass of options; `title` heads them in `--help`."""
    return field(default_factory=cls, metadata={"title": title})


@dataclass(frozen=True)
class Entry:
    """One option of a config class: name, type and settings, and the title of its group."""

    name: str
    hint: Any
    default: Any
    option: Option
    title: str

    @property
    def flag(self) -> str:
        """As it is typed: '--batch-size'."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def kind(self) -> tuple[type, str]:
        """Element type, and 'one', 'many' (tuple of any length), 'map', or the length of a tuple."""
        choices = [t for t in typing.get_args(self.hint) if t is not type(None)]
        optional = typing.get_origin(self.hint) in (types.UnionType, typing.Union)
        inner = choices[0] if optional else self.hint
        origin, args = typing.get_origin(inner), typing.get_args(inner)
        if origin is tuple:
            return _plain(args[0]), "many" if args[-1] is Ellipsis else str(len(args))
        return (str, "map") if origin is dict else (_plain(inner), "one")


def _plain(kind: Any) -> type:
    """A type that converts words; of a union the first."""
    return kind if isinstance(kind, type) else typing.get_args(kind)[0]


@cache
def entries(cls: type) -> dict[str, Entry]:
    """All options of a config class by name, those of its parts included, in the order of the fields."""
    found: dict[str, Entry] = {}

    def collect(cls: type, title: str) -> None:
        hints = typing.get_type_hints(cls)
        for f in fields(cls):
            if "option" in f.metadata:
                default = {} if typing.get_origin(hints[f.name]) is dict else f.default
                default = None if f.default_factory is not MISSING and default is MISSING else default
                if f.name in found:
                    raise TypeError(f"{cls.__name__}: two options are called '{f.name}'.")
                found[f.name] = Entry(f.name, hints[f.name], default, f.metadata["option"], title)
            elif is_dataclass(hints[f.name]):
                collect(hints[f.name], f.metadata.get("title", "") or title)

    collect(cls, "")
    return found


class _KeyValues(argparse.Action):
    """`--x a=1 b=c`: a dict whose values are Python literals if they look like ones, as in timm's train.py."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        pairs = [value.partition("=")[::2] for value in values]
        if wrong := [word for word, (_, value) in zip(values, pairs, strict=True) if not value]:
            parser.error(f"argument {option_string}: expected NAME=VALUE, got '{wrong[0]}'")
        setattr(namespace, self.dest, {key: _literal(value) for key, value in pairs})


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


_WORDS = " words"  # what a name ends with in the namespace if its values came without the flag


def add_options(parser: argparse.ArgumentParser, cls: type, names: Sequence[str] | None = None) -> None:
    """Adds the options of a config class to a parser, grouped by part. Unset options stay out of the namespace.

    `names` are those to add, ungrouped and in this order; by default all.
    """
    groups: dict[str, Any] = {"": parser}
    known = entries(cls)
    for entry in known.values() if names is None else (replace(known[name], title="") for name in names):
        if entry.title not in groups:
            groups[entry.title] = parser.add_argument_group(entry.title)
        flags = [entry.name] if entry.option.positional else [name for name in (entry.option.short, entry.flag) if name]
        groups[entry.title].add_argument(*flags, **_keywords(entry))
        if entry.option.words:
            nargs, same = "?" if entry.kind[1] == "one" else "*", f"the same as {entry.flag}"
            dest, metavar = f"{entry.name}{_WORDS}", entry.option.words
            parser.add_argument(dest, nargs=nargs, default=argparse.SUPPRESS, metavar=metavar, help=same)


def _keywords(entry: Entry) -> dict[str, Any]:
    """The keyword arguments of `add_argument`."""
    spec, (kind, count) = entry.option, entry.kind
    words: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(entry).replace("%", "%%")}
    if kind is bool:
        on_off = spec.negatable or entry.default is not False
        return words | {"action": argparse.BooleanOptionalAction if on_off else "store_true"}
    if entry.default is MISSING and not spec.positional:
        words["required"] = True
    words |= {"metavar": spec.metavar, "choices": spec.choices}
    if count == "map":
        return words | {"action": _KeyValues, "nargs": "*", "metavar": spec.metavar or "K=V"}
    words["type"] = spec.parse or kind
    if spec.const is not None:
        return words | {"nargs": "?", "const": spec.const}
    many = "*" if spec.positional and entry.default is not MISSING else "+"
    return words | {"nargs": int(count) if count.isdigit() else {"one": None, "many": many}[count]}


def _help(entry: Entry) -> str:
    """The help text with the default, unless the text has one."""
    text, default = entry.option.help, entry.default
    if "(default:" in text or entry.option.positional:
        return text
    if default is MISSING:
        return f"{text} (required)"
    if default in (None, "", {}, ()):
        return f"{text} (default: none)"
    shown = [{True: "yes", False: "no"}[v] if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else str(v)
             for v in _values(default)]  # fmt: skip
    return f"{text} (default: {' '.join(shown)})"


def _values(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def words_given(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """The values that the command line sets, by option name; ValueError for unknown options and wrong types."""
    return parsed(parser.parse_args(list(words)))


def parsed(found: argparse.Namespace) -> dict[str, Any]:
    """The values of a parser of `add_options`; ValueError for values that came with and without their flag."""
    given = vars(found)
    for key in [key for key in given if key.endswith(_WORDS)]:
        name, values = key.removesuffix(_WORDS), given.pop(key)
        if name in given:
            flag = f"--{name.replace('_', '-')}"
            both = [value if isinstance(value, str) else " ".join(value) for value in (values, given[name])]
            raise ValueError(f"'{both[0]}' and {flag} '{both[1]}' exclude each other: give the images once.")
        given[name] = values
    return given


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; a ValueError or OSError if it cannot be read, nested without end included."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """The content of a YAML text; a ValueError if it is none."""
    import yaml  # only where it is needed: --help reads no file

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(cls: type, path: str | Path) -> dict[str, Any]:
    """The values that a YAML file of `option: value` lines sets, converted as on the command line, or a ValueError."""
    where = f"--config {path}"
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as e:
        raise ValueError(f"{where} cannot be read: {' '.join(str(e).split())}") from e
    return from_mapping(cls, content, where)


def from_mapping(cls: type, content: Any, where: str) -> dict[str, Any]:
    """Values of a config class from a mapping that a file gave. `where` begins the message of an error."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}, expected `option: value` lines.")
    known, values = entries(cls), {}
    for key, value in content.items():
        entry = known.get(str(key).replace("-", "_"))
        if entry is None:
            raise ValueError(f"{where}: unknown option '{key}'.{closest(str(key), known)}")
        if value is not None:
            values[entry.name] = _convert(entry, value, f"{where}: '{key}'")
    return values


def _convert(entry: Entry, value: Any, where: str) -> Any:
    """A value of a file as the field has it; it goes through the parser, which knows types and choices."""
    kind, count = entry.kind
    if kind is bool or (entry.option.const is not None and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise ValueError(f"{where} takes true or false, got {value!r}.")
        return value if kind is bool else entry.option.const if value else None
    if count == "map":
        if not isinstance(value, dict):
            raise ValueError(f"{where} takes a mapping, got {value!r}.")
        return value
    parser = CommandParser(add_help=False)
    parser.add_argument("--value", **{**_keywords(entry), "required": False})
    try:
        return parser.parse_args(["--value", *map(str, value if isinstance(value, list | tuple) else [value])]).value
    except ValueError as e:
        raise ValueError(f"{where}: {str(e).removeprefix('argument --value: ')}") from None


def from_keywords(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config class from keyword arguments, converted and refused as words are; None is not given."""
    known = entries(cls)
    for name in values:
        if name not in known:
            raise ValueError(f"There is no option '{name}'.{closest(name, known)}")
    given = {name: value for name, value in values.items() if value is not None}
    return {name: _convert(known[name], value, f"argument {known[name].flag}") for name, value in given.items()}


def words_of(cls: type, values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that set these values."""
    words, known = [], entries(cls)
    for name, value in values.items():
        flag = known[name].flag
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, dict):
            words += [flag, *(f"{key}={one}" for key, one in value.items())]
        else:
            words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def build(cls: type[C], *layers: Mapping[str, Any]) -> C:
    """A config from defaults and layers of flat values, of which later ones win; its limits are checked."""
    values: dict[str, Any] = {}
    for layer in layers:
        values |= layer
    config = _nested(cls, values)
    check_limits(config)
    return config


def _nested(cls: type, values: Mapping[str, Any]) -> Any:
    hints, own = typing.get_type_hints(cls), {}
    for f in fields(cls):
        if "option" not in f.metadata and is_dataclass(hints[f.name]):
            own[f.name] = _nested(hints[f.name], values)  # pyright: ignore[reportArgumentType]
        elif f.name in values:
            value = values[f.name]
            own[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**own)


def check_limits(config: Any) -> None:
    """Refuses values outside the limits of their options; the ValueError names option, value and limit."""
    check_values(type(config), flat(config, recorded_only=False))


def check_values(cls: type, values: Mapping[str, Any]) -> None:
    """`check_limits` of some values of a config class."""
    faults = Faults()
    for name, value in values.items():
        with faults.next():
            _check_value(entries(cls)[name], value)
    faults.refuse()


def _check_value(entry: Entry, value: Any) -> None:
    spec = entry.option
    limits = (("at least", spec.at_least, ge), ("above", spec.above, gt), ("at most", spec.at_most, le))
    for one in value if isinstance(value, tuple | list) else (value,):
        if isinstance(one, bool) or not isinstance(one, int | float):
            continue
        for words, limit, holds in limits:
            if limit is not None and not holds(one, limit):  # `not`: NaN is refused as well
                raise ValueError(f"{entry.flag} must be {words} {limit:g}, got {one:g}.")


def evolve(config: C, **values: Any) -> C:
    """A copy with other values, given by flat option names; the parts that hold them are copied as well."""
    own, rest = {}, dict(values)
    for f in fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, f.name)
        if f.name in rest:
            own[f.name] = rest.pop(f.name)
        elif is_dataclass(value) and "option" not in f.metadata:
            inside = {name: rest.pop(name) for name in list(rest) if name in entries(type(value))}
            if inside:
                own[f.name] = evolve(value, **inside)
    if rest:
        raise TypeError(f"{type(config).__name__} has no option {', '.join(rest)}.")
    return replace(config, **own)  # pyright: ignore[reportArgumentType]


def flat(config: Any, recorded_only: bool = True) -> dict[str, Any]:
    """The options by name, tuples as lists: what args.yaml and checkpoints record.

    `recorded_only=False` includes options of one call, such as --resume, and keeps tuples.
    """
    found: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if "option" in f.metadata:
            if f.metadata["option"].recorded or not recorded_only:
                found[f.name] = list(value) if isinstance(value, tuple) and recorded_only else value
        elif is_dataclass(value):
            found |= flat(value, recorded_only)
    return found
