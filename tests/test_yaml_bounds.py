"""YAML that says more than it seems to is refused before anybody builds it, with the key and its line."""

import pytest
import yaml

from litpeft.cli import COMMANDS, parse
from litpeft.cli.yaml_bounds import DEEPEST, MOST, BoundedLoader, TooMuch, compose
from litpeft.core.errors import UserError

PAIRS = list(zip("abcdefgh", "bcdefghi", strict=True))
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in PAIRS
)
DOUBLED = "m0: &m0 {x: 1, y: 2}\n" + "".join(f"m{i}: &m{i} {{p: *m{i - 1}, q: *m{i - 1}}}\n" for i in range(1, 40))
CHAIN = "k0: &k0 [1]\n" + "".join(f"k{i}: &k{i} [*k{i - 1}]\n" for i in range(1, 2000))
HOSTILE = {  # what stands in train.optimizer_args -> the key, its line there, and what is said
    "aliases that multiply": (BOMB, "d", 4, "more than 10,000 values"),
    "aliases that multiply in mappings": (DOUBLED, "m11", 12, "more than 10,000 values"),
    "aliases that go deep": (CHAIN, "k46", 47, "nested more than 50 levels"),
    "an alias that holds itself": ("a: 1\nb: &b [1, {c: *b}]\n", "b.c", 2, r"holds itself, through the alias \*b"),
    "a mapping that holds itself": ("a: &a\n  b: *a\n", "a.b", 2, r"holds itself, through the alias \*a"),
    "many levels": ("a: 1\nb: " + "[" * 90 + "]" * 90 + "\n", "b", 2, "nested more than 50 levels"),
    "many values": ("a: [" + "1, " * 200_000 + "1]\n", "a", 1, "more than 10,000 values"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_yaml_beyond_the_bounds_is_refused_with_key_and_line(tmp_path, case):
    text, key, line, what = HOSTILE[case]
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  optimizer_args:\n" + "".join(f"    {part}\n" for part in text.splitlines()))
    with pytest.raises(UserError, match=what) as error:
        parse("finetune lora", COMMANDS["finetune lora"], ["--config", str(path)])
    assert (error.value.where, error.value.exit_code) == (f"{path}:{line + 2}", 2)
    assert f'"train.optimizer_args.{key}"' in error.value.what


@pytest.mark.parametrize("option", ["--train.optimizer_args", "--method.targets", "--data.system", "--method.rank"])
def test_yaml_beyond_the_bounds_is_refused_on_the_command_line(option):
    value = "{" + ", ".join(BOMB.splitlines()) + "}"
    with pytest.raises(UserError, match="more than 10,000 values") as error:
        parse("finetune lora", COMMANDS["finetune lora"], [option, value])
    assert (error.value.where, error.value.exit_code) == (option, 2)


def test_yaml_within_the_bounds_is_read_as_pyyaml_reads_it():
    for text in (
        "a: &a [1, 2]\nb: [*a, *a, {c: *a}]\n",
        "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1),
        CHAIN[: CHAIN.index("k9")],
    ):
        assert yaml.load(text, BoundedLoader) == yaml.safe_load(text)


@pytest.mark.parametrize("more", [0, 1])
def test_the_values_that_aliases_repeat_are_all_counted(more):
    ones = MOST - 1 - 3 * 101 + more  # beside the list and three times one of 100
    text = f"[&a [{'1,' * 100}], *a, *a{',1' * ones}]"
    assert sum(1 if item == 1 else 101 for item in yaml.safe_load(text)) + 1 == MOST + more
    if more:
        with pytest.raises(TooMuch, match="more than 10,000 values"):
            compose(text)
    else:
        assert compose(text) is not None


@pytest.mark.parametrize(
    "words", ["generate X", "generate m X", "evaluate m X", "merge X", "convert m X", "download X"]
)
def test_yaml_beyond_the_bounds_is_refused_where_no_option_stands_before_it(words):
    name, *rest = ["{" + ", ".join(BOMB.splitlines()) + "}" if word == "X" else word for word in words.split()]
    with pytest.raises(UserError, match="more than 10,000 values") as error:
        parse(name, COMMANDS[name], rest)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "key", ["method.rank", "train.lr", "train.max_time", "data.system", "train.optimizer_args.eps"]
)
def test_a_number_of_more_digits_than_python_reads_is_refused_by_its_key(tmp_path, key):
    path = tmp_path / "run.yaml"
    path.write_text(
        "{" + "".join(f"{part}: {{" for part in key.split("."))[:-1] + "9" * 10_000 + "}" * key.count(".") + "}"
    )
    with pytest.raises(UserError, match=f'"{key}" is a number of 10,000 characters') as error:
        parse("finetune lora", COMMANDS["finetune lora"], ["--config", str(path)])
    assert (error.value.where, error.value.exit_code) == (f"{path}:1", 2)
