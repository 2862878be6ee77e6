"""Settings from YAML files and command-line options, checked against the types of :class:`Config` (jsonargparse)."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import resources
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from metacal.data import Augmentation
from metacal.tc2 import Stage
from metacal.train.config import Config, DataConfig, EvaluateConfig, NetworkConfig, TC2Config, TrainConfig


class _ConfigFile(ActionConfigFile):
    """Reads a file over what is there; what it writes out though its classes have it anyway is left to them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        _left_to_class(namespace)


def _left_to_class(settings: Namespace) -> Namespace:
    """The settings without those of a named class that are its own defaults; they are filled in at the end of parsing.

    Those that are there stay, by name, where a later option names another class: SimCLR's temperature would become MoCo's, though nobody
    had asked for it.
    """
    for value in list(settings.values(branches=True)):
        if isinstance(value, Namespace) and "class_path" in value and "init_args" in value:
            named = locate(value.class_path)
            for field in fields(named) if is_dataclass(named) else ():
                if value.init_args.get(field.name, MISSING) == field.default:
                    del value.init_args[field.name]
    return settings


class Parser(ArgumentParser):
    """Takes settings by their whole names only, and says which one was probably meant."""

    def __init__(self, **options: Any) -> None:
        # Whoever is not named is, or belongs to, the parser of the settings.
        super().__init__(**{"allow_abbrev": False, "prog": "metacal pretrain", **options})

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """As jsonargparse's, which would take a section that is none for what a class is called with."""
        try:
            read_settings(path)
        except (ValueError, OSError) as error:
            self.error(str(error))
        return super().parse_path(path, *args, **kwargs)

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """The defaults, without what their classes have anyway: see :func:`_left_to_class`."""
        return _left_to_class(super().get_defaults(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message with the nearest known setting, and exits with status 2."""
        unknown = re.search(r"(?:unrecognized arguments: --|[Oo]ption ['\"])([\w.]+)", message)
        if unknown:
            group = re.search(r"Group ['\"]([\w.]+)['\"]", message)
            asked = f"{group[1]}.{unknown[1]}" if group else unknown[1]
            close = difflib.get_close_matches(asked, self._known(message), n=1, cutoff=0.5)
            if close:
                message += f"\nThere is no setting '{asked}'; did you mean '{close[0]}'?"
        no_class = re.search(r"key ['\"]([\w.]+)['\"]:\s+Expected a dot import path string: (\S+)", message)
        if no_class and (family := self._family(no_class[1])):
            message += f"\n`{no_class[1]}` may be {', '.join(family)}, or the import path of your own; got '{no_class[2]}'."
        prog = self.prog.replace(" [options]", "")
        self._print_message(f"{prog}: error: {message}\nFor all settings: {prog} --help\n", sys.stderr)
        raise SystemExit(2)

    def _known(self, message: str) -> list[str]:
        """The settings of this parser, or of the subcommand that a message is about."""
        command = re.search(r"Subcommand ['\"](\w+)['\"]", message)
        if command:
            (commands,) = (action.choices for action in self._actions if isinstance(action.choices, dict))
            return commands[command[1]]._known("")
        return [option.lstrip("-") for action in self._actions for option in action.option_strings]

    def _family(self, setting: str) -> list[str]:
        """The names of the library's classes that a setting takes."""
        kinds = (getattr(action, "_typehint", None) for action in self._actions if action.dest == setting)
        children = [child for kind in kinds for child in getattr(kind, "__subclasses__", list)()]
        return sorted(child.__name__ for child in children if child.__module__.startswith("metacal."))


def configurations() -> list[str]:
    """The names of the packaged configurations."""
    names = (path.name for path in resources.files("metacal").joinpath("configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_config(path: str | Path) -> Config:
    """The configuration that a YAML file describes; what it leaves out has its default."""
    parser = settings_parser()
    return as_config(parser.instantiate(parser.parse_path(str(path))))


def config_of(text: str) -> Config:
    """The configuration that settings written as YAML or JSON describe."""
    parser = settings_parser()
    return as_config(parser.instantiate(parser.parse_string(text)))


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Errors:
        ValueError: it is not YAML; names the file and the place in it.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} should be a YAML file: {error}") from error


def read_settings(path: str | Path) -> Mapping[str, Any]:
    """The settings that a YAML file writes, as it writes them.

    Errors:
        ValueError: it, or one of its sections, is no mapping.
    """
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(
            f"{path} should be a file of settings, it holds {given or 'none'}. `metacal pretrain --print_config` prints a whole one."
        )
    _check_sections(Config(), given, str(path))
    return given


def _check_sections(like: Any, given: Mapping[str, Any], place: str) -> None:
    for name, section in vars(like).items():
        if isinstance(section, _SECTIONS) and name in given:
            if not isinstance(given[name], dict):
                first = next(iter(vars(section)))
                raise ValueError(f"{place}: `{name}` should hold settings by name, as {name}: {{{first}: ...}}; got {given[name]!r}.")
            _check_sections(section, given[name], f"{place}: {name}")


def packaged(name: str, *overrides: str) -> Config:
    """A packaged configuration, with settings changed as on the command line: ``packaged("tc2_digits", "--seed", "1")``."""
    parser = settings_parser()
    return as_config(parser.instantiate(parser.parse_args(["--config", str(find(name, parser)), *overrides])))


def settings_parser() -> Parser:
    """The parser of `metacal pretrain`: every setting of :class:`Config`, from files and options."""
    parser = Parser(
        description="Trains an encoder. Settings come from the configuration (a packaged name or a path, as first argument), then from "
        f"the options. Packaged configurations: {', '.join(configurations())}."
    )
    parser.add_argument("--config", action=_ConfigFile, help="a YAML file of settings")
    parser.add_class_arguments(Config, None)
    # Values of open families: their defaults are given as the YAML would give them.
    unrolled = {"class_path": "metacal.adjoints.Unrolled", "init_args": {"mode": "graph"}}
    parser.set_defaults(
        {
            "objective": {"class_path": "metacal.objectives.SimCLR"},
            "tc2.tasks": {"class_path": "metacal.train.config.Random"},
            "tc2.calibrator": {"class_path": "metacal.tc2.Networks"},
            "tc2.calibrator_stage": {"lr": 1e-2, "steps": 1, "adjoint": unrolled},
            "tc2.encoder_stage": {"lr": 0.05, "steps": 1, "adjoint": unrolled},
        }
    )
    return parser


def as_config(init: Namespace) -> Config:
    """The instantiated settings as one value."""
    return Config(**{field.name: init[field.name] for field in fields(Config)})


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that :func:`load_config` reads back."""
    import yaml

    return yaml.safe_dump({name: _plain(value) for name, value in vars(config).items()}, sort_keys=False)


_SECTIONS = (DataConfig, NetworkConfig, TC2Config, TrainConfig, EvaluateConfig, Stage, Augmentation)


def _plain(value: Any) -> Any:
    if isinstance(value, _SECTIONS):
        return {name: _plain(field) for name, field in vars(value).items()}
    if is_dataclass(value):  # one of an open family: named by its class
        return {"class_path": _path(type(value)), "init_args": {field.name: _plain(getattr(value, field.name)) for field in fields(value)}}
    if callable(value):
        return _path(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _path(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def find(name: str, parser: Parser) -> Path:
    """A path to one's own file, or the packaged file of that name."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            parser.error(f"There is no configuration file {name}. Packaged ones: {', '.join(configurations())}.")
        return Path(name)
    if name not in configurations():
        close = difflib.get_close_matches(name, configurations(), n=1)
        parser.error(
            f"There is no packaged configuration '{name}'"
            + (f"; did you mean '{close[0]}'? " if close else ". ")
            + f"There are: {', '.join(configurations())}. For your own file give its path, ending in .yaml."
        )
    return Path(str(resources.files("metacal").joinpath("configs").joinpath(f"{name}.yaml")))
