"""Files and command lines become a Config, and every mistake in them becomes a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neox_native.config.load import dump, from_command_line, load
from neox_native.config.schema import Config, Data
from neox_native.config.settings import SETTINGS, documentation, help_text
from neox_native.errors import UserError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str = "", overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        load(write(tmp_path, "bad.toml", text), overrides or [])
    return str(error.value)


def test_no_file_gives_the_defaults() -> None:
    assert load(None) == Config()


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = load(write(tmp_path, "c.toml", "[optimizer]\nlr = 1e-4\n[model]\nhidden_size = 64\n"))
    assert (config.optimizer.lr, config.model.hidden_size) == (1e-4, 64)
    assert config.model.num_layers == Config().model.num_layers
    assert config.training == Config().training


def test_a_file_of_an_earlier_version_may_still_say_that_a_retired_setting_is_empty(tmp_path: Path) -> None:
    assert load(write(tmp_path, "old.toml", '[data]\ntrain = "a"\ntest = ""\n')).data == Data(train="a")


def test_whole_numbers_serve_as_floats(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, "c.toml", "[optimizer]\nlr = 1\nbetas = [0, 0.5]\n"), ["--training.clip_grad_norm", "2"]
    )
    assert repr(config.optimizer.lr) == "1.0" and repr(config.optimizer.betas) == "[0.0, 0.5]"
    assert repr(config.training.clip_grad_norm) == "2.0"


def test_extends_merges_setting_by_setting_through_a_chain(tmp_path: Path) -> None:
    write(tmp_path, "deep/a.toml", "[model]\nnum_layers = 2\nhidden_size = 32\n[run]\nseed = 5\n")
    write(tmp_path, "b.toml", 'extends = "deep/a.toml"\n[model]\nhidden_size = 48\n')
    config = load(write(tmp_path, "c.toml", 'extends = "b.toml"\nmodel.num_heads = 4\n'))
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads, config.run.seed) == (2, 48, 4, 5)


def test_extends_finds_the_shipped_configs_from_anywhere(tmp_path: Path) -> None:
    config = load(write(tmp_path, "mine.toml", 'extends = "pythia/70m.toml"\n[run]\nseed = 7\n'))
    assert (config.model.hidden_size, config.run.seed) == (512, 7)


def test_a_chain_of_extends_may_be_long_and_brackets_may_not_nest_without_end(tmp_path: Path) -> None:
    for number in range(1500):
        write(tmp_path, f"{number}.toml", f'extends = "{number + 1}.toml"\n')
    write(tmp_path, "1500.toml", "[run]\nseed = 7\n")
    assert load(tmp_path / "0.toml").run.seed == 7
    brackets = "[" * 5000 + "]" * 5000
    assert "bad.toml nests its lists or tables too deep" in refusal(tmp_path, f"[data]\ntrain = {brackets}\n")
    assert "data.train = [" in refusal(tmp_path, "", ["--data.train", brackets])


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'extends = "bad.toml"\n')
    message = refusal(tmp_path, 'extends = "a.toml"\n')
    assert message.count("bad.toml") == 2 and "circle" in message


def test_a_missing_base_names_both_places(tmp_path: Path) -> None:
    message = refusal(tmp_path, 'extends = "pythia/7m.toml"\n')
    assert str(tmp_path / "pythia/7m.toml") in message and "configs/pythia/7m.toml" in message


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--parallel.tp", "2"], ("parallel", "tp", 2)),
        (["--parallel.dp", "-1"], ("parallel", "dp", -1)),
        (["--optimizer.lr=3e-4"], ("optimizer", "lr", 3e-4)),
        (["--compile.enabled"], ("compile", "enabled", True)),
        (["--compile.enabled=false"], ("compile", "enabled", False)),
        (["--compile.enabled", "auto"], ("compile", "enabled", "auto")),
        (["--compile.enabled", "--parallel.tp", "1"], ("compile", "enabled", True)),
        (["--logging.tensorboard", "false"], ("logging", "tensorboard", False)),
        (["--logging.tensorboard=false"], ("logging", "tensorboard", False)),
        (["--run.dir", "runs/with space=sign"], ("run", "dir", "runs/with space=sign")),
        (["--run.dir="], ("run", "dir", "")),
        (["--run.dir=--x"], ("run", "dir", "--x")),
        (["--optimizer.betas", "[0.8, 0.9]"], ("optimizer", "betas", [0.8, 0.9])),
        (["--parallel.stage_layers=[1, 3]"], ("parallel", "stage_layers", [1, 3])),
        (["--data.train", "data/pile"], ("data", "train", "data/pile")),
        (["--data.train", '[{path = "a", weight = 1.5}]'], ("data", "train", [{"path": "a", "weight": 1.5}])),
        (["--checkpoint.save_steps", "pythia"], ("checkpoint", "save_steps", "pythia")),
        (["--checkpoint.save_steps", "[1, 2]"], ("checkpoint", "save_steps", [1, 2])),
        (["--training.steps", "1", "--training.steps", "2"], ("training", "steps", 2)),
    ],
)
def test_overrides_in_both_spellings(words: list[str], expected: tuple[str, str, object]) -> None:
    section, name, value = expected
    assert getattr(getattr(load(None, words), section), name) == value


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "c.toml", "[training]\nsteps = 5\nmicro_batch_size = 2\n")
    config = load(path, ["--training.steps=9"])
    assert (config.training.steps, config.training.micro_batch_size) == (9, 2)


@pytest.mark.parametrize(
    "text, overrides, parts",
    [
        ("[optimizer]\nlrr = 1.0\n", [], ["bad.toml", "optimizer.lrr", "nearest is optimizer.lr."]),
        ("[optimiser]\nlr = 1.0\n", [], ["bad.toml", "[optimiser]", "[optimizer]"]),
        ("[optimizer]\nwarmup_fraction = 0.1\n", [], ["optimizer.warmup_fraction", "lr_schedule.warmup_fraction"]),
        ("", ["--parallel.tpp=2"], ["command line", "parallel.tpp", "nearest is parallel.tp."]),
        ("[training]\nsteps = 'many'\n", [], ["bad.toml", 'training.steps = "many"', "a whole number", "1000"]),
        ("[training]\nsteps = 10.0\n", [], ["training.steps = 10.0", "a whole number"]),
        ("[training]\nsteps = true\n", [], ["training.steps = true", "a whole number"]),
        ("[training]\nsteps = 1979-05-27\n", [], ["training.steps = 1979-05-27", "a whole number"]),
        ("[optimizer]\nlr = '1e-4'\n", [], ['optimizer.lr = "1e-4"', "must be a number"]),
        (f"[optimizer]\nlr = {10**400}\n", [], ["optimizer.lr", "must be a number"]),
        (f"[optimizer]\nlr = 0x{'f' * 5000}\n", [], ["optimizer.lr = 0xffff", "must be a number"]),
        ("[optimizer]\nbetas = [0.9, 'x']\n", [], ["optimizer.betas", "a list of numbers"]),
        ("[training]\nprecision = 'fp8'\n", [], ['training.precision = "fp8"', '"fp32", "bf16", "fp16"']),
        ("[data]\ntrain = 3\n", [], ["data.train = 3", "a string or a list of tables"]),
        ("training = 3\n", [], ["bad.toml", "training = 3", "[training]"]),
        ("steps = 3\n", [], ["bad.toml", "steps = 3 stands outside", "write steps below [training]"]),
        ("warmup_fractoin = 3\n", [], ["bad.toml", "write warmup_fraction below [lr_schedule]"]),
        ("extends = 3\n", [], ["extends = 3"]),
        ("[data]\ntest = 'a'\n", [], ["bad.toml: data.test is no setting any more", '"969,30" for "969,30,1"']),
        ("[run\n", [], ["bad.toml", "not valid TOML", "line 1"]),
        ("", ["--training.steps", "1e3"], ["command line", "training.steps = 1e3", "a whole number"]),
        ("", ["--compile.enabled=yes"], ["compile.enabled = yes", 'true or false or "auto"']),
        ("", ["--parallel.stage_layers", "1,3"], ["parallel.stage_layers = 1,3", "a list of whole numbers"]),
        ("", ["--training.precision", "bf61"], ["training.precision = bf61", '"bf16"']),
        ("", ["--training.steps"], ["--training.steps needs a value", "a whole number"]),
        ("", ["steps=3"], ["'steps=3'", "--parallel.tp 2"]),
    ],
)
def test_mistakes_get_a_sentence(tmp_path: Path, text: str, overrides: list[str], parts: list[str]) -> None:
    message = refusal(tmp_path, text, overrides)
    for part in parts:
        assert part in message
    assert message.endswith(".")


def test_a_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "[run]\nsede = 1\n")
    assert "base.toml: there is no setting run.sede; the nearest is run.seed." in refusal(
        tmp_path, 'extends = "base.toml"'
    )


def test_unreadable_files_get_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(UserError, match=f"Cannot read the config file {re.escape(str(path))}: "):
            load(path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.toml is not valid TOML"):
        load(tmp_path / "binary.toml")


def test_dump_loads_back_to_an_equal_config(tmp_path: Path) -> None:
    config = load(
        None,
        [
            "--optimizer.lr",
            repr(0.1 + 0.2),
            "--optimizer.eps=1e-300",
            "--run.dir",
            'a "quoted"\tdär \\ \x7f\U0001f600',
            "--data.train",
            '[{path = "x", weight = 0.1}, {path = "y", weight = 2, "odd key" = true}]',
            "--checkpoint.save_steps=[1, 2]",
            "--parallel.stage_layers=[1, 2]",
            "--compile.enabled",
        ],
    )
    assert load(write(tmp_path, "config.toml", dump(config))) == config
    assert load(write(tmp_path, "defaults.toml", dump(Config()))) == Config()


def test_dump_says_how_to_repeat_the_run() -> None:
    layout = ["--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=2"]
    assert dump(load(None, layout)).startswith("#")
    assert "--standalone --nproc-per-node 8 train.py" in dump(load(None, layout))
    assert "--nnodes 8 --nproc-per-node 8 train.py" in dump(load(None, [*layout, "--parallel.dp=16"]))
    assert "--nnodes NODES --nproc-per-node GPUS train.py" in dump(load(None, [*layout, "--parallel.dp=3"]))


def test_command_line_reads_config_and_overrides(tmp_path: Path) -> None:
    path = str(write(tmp_path, "c.toml", "[training]\nsteps = 5\n"))
    for words in (["--config", path, "--parallel.tp=2"], ["--parallel.tp", "2", f"--config={path}"]):
        config = from_command_line(words)
        assert (config.training.steps, config.parallel.tp) == (5, 2)


@pytest.mark.parametrize("words", [[], ["--config"], ["--parallel.tp", "2"]])
def test_a_missing_config_gets_a_sentence(words: list[str]) -> None:
    with pytest.raises(UserError, match="--config configs/quickstart.toml"):
        from_command_line(words)


def test_a_second_config_is_refused_and_both_are_named() -> None:
    with pytest.raises(UserError, match="given 2 times: one.toml, two.toml"):
        from_command_line(["--config", "one.toml", "--parallel.tp=2", "--config=two.toml"])


def test_a_tools_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        from_command_line(["--help"], about="Draws a plan.")
    assert capsys.readouterr().out.startswith("Draws a plan.\nAny setting may follow")


def test_help_lists_every_setting_with_documentation_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        from_command_line(["--config", "absent.toml", "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert text == help_text() and "--dry-run" in text
    for setting in SETTINGS.values():
        assert documentation(setting), f"{setting.dotted} has no docstring"
        assert f"--{setting.dotted}  " in text
    assert "default 0.95" not in text and "default [0.9, 0.95]" in text
    assert "Sequence length of training [tokens]." in text
    assert "--parallel.zero_stage  a whole number, between 0 and 3; default 0" in text


def test_a_keyword_field_drops_its_underscore() -> None:
    assert all(not dotted.endswith("_") for dotted in SETTINGS)
