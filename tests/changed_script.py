"""A script with the changes made that an error asks for, line by line, and nothing else."""

import ast
import re
from typing import Any

_LINE = re.compile(r"^- `?(\w+)`?(?:=.*)?: (write .*|drop it: .*|move it into .*|nothing calls it.*)\.$")
_INTO_TRAINER, _INTO_CONFIG = " in the call of DPOTrainer", " in DPOConfig"


def changed(source: str, words: list[str], message: str) -> tuple[str, list[str]]:
    """The source and the command line after the changes that the message names."""
    source = source.replace("TrainingArguments(", "DPOConfig(") if "pass a `holdfast.DPOConfig`" in message else source
    if "Call `super().__init__(" in message:
        source = source.replace("Trainer.__init__(self, ", "super().__init__(")
    tree = ast.parse(source)
    is_trainer = False
    for line in message.splitlines():
        is_trainer = "DPOTrainer" in line if not line.startswith("-") else is_trainer
        found = _LINE.match(line)
        if found is not None:
            words = _change(tree, words, found[1], found[2], is_trainer=is_trainer)
    return ast.unparse(tree), words


def _change(tree: ast.Module, words: list[str], name: str, advice: str, *, is_trainer: bool) -> list[str]:
    if advice.startswith("nothing calls it"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                node.body = [each for each in node.body if getattr(each, "name", "") != name]
        return words
    if f"--{name}" in words:
        place = words.index(f"--{name}")
        added = [word for option, value in _options(advice, None).items() for word in _words(option, value)]
        return [*words[:place], *added, *words[place + 2 :]]
    tree.body = [
        each for each in tree.body if not ast.unparse(each).startswith("setattr(") or name not in ast.dump(each)
    ]
    taken: ast.expr | None = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_trainer(node) == is_trainer:
            for word in [word for word in node.keywords if word.arg == name]:
                node.keywords.remove(word)
                taken = word.value
                if not advice.startswith("move") and not advice.endswith(_INTO_CONFIG):
                    _add(node, _options(advice, taken), replaces=True)
        if isinstance(node, ast.Dict) and not is_trainer:
            for place, key in enumerate(node.keys):
                if isinstance(key, ast.Constant) and key.value == name:
                    taken = node.values[place]
                    options = _options(advice, taken)
                    node.keys[place : place + 1] = [ast.Constant(option) for option in options]
                    node.values[place : place + 1] = list(options.values())
                    break
    if is_trainer and (advice.startswith("move") or advice.endswith(_INTO_CONFIG)):
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "DPOConfig"
        ]
        for call in calls:
            _add(call, _options(advice, taken), replaces=False)
    return words


def _is_trainer(node: ast.Call) -> bool:
    return ast.unparse(node.func).endswith("Trainer")


def _add(call: ast.Call, options: dict[str, ast.expr], *, replaces: bool) -> None:
    """Writes the options into a call. One that stands there already stays, or is replaced."""
    present = {word.arg: word for word in call.keywords}
    for name, value in options.items():
        if name not in present:
            call.keywords.append(ast.keyword(name, value))
        elif replaces:
            present[name].value = value


def _options(advice: str, taken: ast.expr | None) -> dict[str, ast.expr]:
    """The options that a line says to write; a value that it does not show is the one that was `taken`."""
    if advice.startswith("drop"):
        return {}
    text = advice.removeprefix("write ").removesuffix(_INTO_TRAINER).removesuffix(_INTO_CONFIG)
    text = text.removeprefix("move it into DPOConfig(").removesuffix(")") if advice.startswith("move") else text
    text = re.sub(r" \([^()]*\)$", "", text)
    call: Any = ast.parse(f"call({text})", mode="eval").body
    unknown = (ast.Constant, type(...))
    return {
        word.arg: taken
        if taken is not None and isinstance(word.value, unknown[0]) and word.value.value is ...
        else word.value
        for word in call.keywords
    }


def _words(name: str, value: ast.expr) -> list[str]:
    found = ast.literal_eval(value)
    return [f"--{name}", *map(str, found if isinstance(found, list) else [found])]
