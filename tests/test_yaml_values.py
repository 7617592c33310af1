"""Values in a YAML file and on the command line: a number is what its decimal digits say, or it is refused."""

import pytest
import yaml
from test_cli import fails

from litpeft.cli import COMMANDS, parse
from litpeft.cli.yaml_values import scalars

NEEDED = ["--base.dir", "m", "--data.path", "d", "--out", "o"]
DECIMAL = ["90", "+5", "0.0002", "2e-4", "2E-4", "1.5e+3", ".5", "5.", "0", "0.0", "1e4", "1_000", "1_0.5"]
ODD = {
    "1:30": "in base 60",
    "190:20:30.15": "in base 60",
    "010": "with a leading 0, which stands for base 8",
    "08": "with a leading 0, which stands for base 8",
    "-017": "with a leading 0, which stands for base 8",
    "0x10": "in base 16",
    "0b1": "in base 2",
    "0o10": "in base 8",
}
SPELT = {"plain": "{}", "quoted": '"{}"', "single": "'{}'", "tagged": "!!int '{}'"}


def settings(*argv: str):
    return parse("finetune lora", COMMANDS["finetune lora"], [*NEEDED, *argv])[:2]


def refused(capsys, file, text: str, method: str = "lora") -> str:
    file.write_text(text)
    code, said = fails(capsys, "finetune", method, *NEEDED, "--config", str(file))
    assert code == 2
    return said


@pytest.mark.parametrize("text", DECIMAL)
def test_a_number_in_decimal_digits_is_that_number(text: str, tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"train:\n  weight_decay: {text}\n  optimizer_args:\n    eps: {text}\n    betas: [{text}, 0.5]\n")
    for argv in (
        ["--config", str(file)],
        ["--train.weight_decay", text, "--train.optimizer_args", f"{{eps: {text}, betas: [{text}, 0.5]}}"],
    ):
        train = settings(*argv)[0].train
        given = train.weight_decay, train.optimizer_args["eps"], *train.optimizer_args["betas"]
        assert given == (*[float(text)] * 3, 0.5)


@pytest.mark.parametrize("spelt", SPELT.values(), ids=SPELT)
@pytest.mark.parametrize("text", ODD)
def test_a_number_in_another_base_is_refused_with_its_key_and_line(text: str, spelt: str, tmp_path, capsys) -> None:
    file, value = tmp_path / "a.yaml", spelt.format(text)
    for content, key, line in (
        (f"train:\n  lr: {value}\n", "train.lr", 2),
        (f"train:\n  epochs: {value}\n", "train.epochs", 2),
        (f"train:\n  max_time: {value}\n", "train.max_time", 2),
        (f"train:\n  optimizer_args:\n    eps: {value}\n", "train.optimizer_args.eps", 3),
        (f"train:\n  optimizer_args:\n    betas: [0.9, {value}]\n", "train.optimizer_args.betas", 3),
        (f"method:\n  ranks:\n    '*.q': {value}\n", "method.ranks.*.q", 3),
    ):
        said = refused(capsys, file, content)
        assert f'{file}:{line}: "{key}" is {text}, a number {ODD[text]}' in said


@pytest.mark.parametrize("text", ODD)
def test_a_number_in_another_base_is_refused_on_the_command_line(text: str, capsys) -> None:
    for words, key in (
        (["--train.lr", text], "train.lr"),
        ([f"--train.epochs={text}"], "train.epochs"),
        (["--train.optimizer_args.eps", text], "train.optimizer_args.eps"),
        (["--train.optimizer_args", f"{{eps: {text}}}"], "train.optimizer_args"),
        (["--method.ranks", f'{{"*.q": {text}}}'], "method.ranks"),
    ):
        code, said = fails(capsys, "finetune", "lora", *NEEDED, *words)
        assert (code, f'"{key}" is {text}, a number {ODD[text]}' in said) == (2, True), said


@pytest.mark.parametrize("text", ["yes", "No", "on", "OFF"])
def test_a_word_is_a_boolean_only_where_nothing_else_can_stand(text: str, tmp_path, capsys) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"train:\n  compile: {text}\n")
    assert settings("--config", str(file))[0].train.compile is (text.lower() in ("yes", "on"))
    said = refused(capsys, file, f"data:\n  system: {text}\n")
    assert f'{file}:2: "data.system" must be text, and YAML reads {text} as' in said
    said = refused(capsys, file, f"train:\n  optimizer_args:\n    amsgrad: {text}\n")
    assert f'{file}:3: "train.optimizer_args.amsgrad" is {text}, which YAML reads as' in said
    said = refused(capsys, file, f"train:\n  optimizer_args:\n    {text}: 1\n")
    assert f'{file}:3: "train.optimizer_args.{text}" must be text' in said


@pytest.mark.parametrize("text", ["010", "1:30", "12", "1.5", "yes"])
def test_text_that_looks_like_a_number_needs_quotes_in_a_file_and_none_on_the_command_line(
    text: str, tmp_path, capsys
) -> None:
    file = tmp_path / "a.yaml"
    for content in (f"out: {text}\n", f"method:\n  targets: ['*', {text}]\n"):
        assert "must be text, and YAML reads" in refused(capsys, file, content)
    file.write_text(f"data:\n  system: '{text}'\nmethod:\n  targets: ['{text}']\n")
    for argv in (["--config", str(file)], ["--data.system", text, "--method.targets", text]):
        run, method = settings(*argv)
        assert (run.data.system, method.targets) == (text, (text,))


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
def test_an_argument_of_the_optimiser_that_is_not_finite_is_refused(text: str, tmp_path, capsys) -> None:
    said = refused(capsys, tmp_path / "a.yaml", f"train:\n  optimizer_args:\n    eps: {text}\n")
    assert "train.optimizer_args.eps must be finite" in said


def test_values_that_aliases_multiply_are_looked_at_once() -> None:
    lines = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20))]
    root = yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)
    assert len(list(scalars(root, set()))) == 20 + 2  # keys, and the two numbers
