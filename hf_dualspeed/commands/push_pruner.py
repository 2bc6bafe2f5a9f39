"""`dualspeed push-pruner`: publishes a pruner on the Hub, with its card."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path

import yaml

from ..hub.upload import card_text
from ..pruners import AutoPruner, Pruner, available_pruners, pruner_class
from ..pruners.card import TAGS, push_pruner, usage
from ..publishing.cards import split_front_matter
from ..utils.constants import CARD_NAME
from ..utils.progress import Work
from ..utils.text import parse_json
from ..utils.validation import Parser, check_keys


def main(argv: list[str]) -> None:
    options = parse(argv)
    settings = dict(setting(words) for words in options.set)
    if options.pruning_ratio is not None:
        settings["pruning_ratio"] = options.pruning_ratio
    pruner = build(options.pruner, settings, options.trust_remote_code)
    with Work(f"Pushing {options.pruner}"):
        commit = push_pruner(
            pruner,
            options.repo,
            read_results(options.results),
            options.commit_message,
            own_card=local_card(Path(options.pruner)),
            private=options.private or None,
            revision=options.revision,
        )
    print(f"{commit.commit_url}\n\nTo use it:\n\n{usage(pruner, options.repo, options.revision)}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dualspeed push-pruner",
        description="Publishes a pruner on the Hub, with its card.",
        epilog="The token is that of `hf auth login` or of the environment variable HF_TOKEN.",
    )
    parser.add_argument("pruner", help="a registered pruner (see `dualspeed pruners`) or the folder of a saved one")
    parser.add_argument("repo", help="the Hub repo, user/name; made where it does not exist")
    parser.add_argument("--pruning_ratio", type=float, help="fraction of the visual tokens removed, in [0, 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the pruner")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--revision", help="the branch to push to; made where it does not exist")
    parser.add_argument("--results", help="JSON file with measured values for the card: a mapping, or a list of rows")
    parser.add_argument("--commit_message", help="what the repo's history says")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code in the folder of the pruner")
    return parser.parse_args(argv)


def setting(words: str) -> tuple[str, object]:
    """Key and value of "key=value". The value is YAML."""
    key, equals, value = words.partition("=")
    if not equals:
        raise ValueError(f"`--set` takes KEY=VALUE, got {words!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"`--set` takes KEY=VALUE with a value in YAML, got {words!r}: {error}.") from None


def build(name: str, settings: dict, trust_remote_code: bool = False) -> Pruner:
    """The pruner to publish: a registered one or that of a folder, with changed settings.

    Raises:
        ValueError: a setting is unknown or not allowed, or the pruner is learned and no folder holds its weights.
    """
    if name in available_pruners():
        config_class = pruner_class(name).config_class
        check_keys("--set", settings, [f.name for f in fields(config_class)])
        pruner = pruner_class(name)(config_class.from_dict(settings, "the command line"))
        if pruner.state_dict():
            raise ValueError(f"The pruner {name!r} is learned: give the folder of a run that trained it.")
        return pruner
    pruner = AutoPruner.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_keys("--set", settings, [f.name for f in fields(pruner.config)])
    known = type(pruner.config).from_dict({**asdict(pruner.config), **settings}, "the command line")
    pruner.reconfigure(**{key: getattr(known, key) for key in settings})
    return pruner


def read_results(path: str | None) -> dict | list | None:
    if path is None:
        return None
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"`--results` {path!r} is no JSON file: {error}.") from None


def local_card(folder: Path) -> str:
    """The card of a pruner's folder. The card of a trained model's folder is not the pruner's."""
    path = folder / CARD_NAME
    if not path.is_file():
        return ""
    card = card_text(path, repr(str(path)))
    is_model = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    return "" if is_model and TAGS[1] not in (split_front_matter(card)[0].get("tags") or []) else card
