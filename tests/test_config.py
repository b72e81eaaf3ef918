"""Settings: strict reading, all errors at once, helpful words, round trip, and the configurations that are shipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from ladir.config import Config
from ladir.config.checks import RANGES, Range, values
from ladir.config.idle import _NEEDS, idle_settings
from ladir.config.loader import ConfigError, describe, load_config, parse_args, save_config, setting_names, validate

CONFIGS = Path(__file__).parent.parent / "configs"


def errors_of(*overrides: str, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(None if path is None else str(path), overrides)
    assert all(error in str(caught.value) for error in caught.value.errors)
    return caught.value.errors


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def fields(group: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        yield f"{prefix}{field.name}", field, value
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")


def test_defaults_are_valid_and_every_setting_has_help() -> None:
    assert load_config(None) == Config()
    assert validate(Config()) == []
    for name, field, _ in fields(Config()):
        assert len(field.metadata["help"]) > 5, f"{name} has no help"


def test_help_mentions_every_setting_its_default_and_its_choices() -> None:
    text = describe()
    unwrapped = " ".join(text.split())
    leaves = [(name, field, value) for name, field, value in fields(Config()) if not dataclasses.is_dataclass(value)]
    assert sorted(setting_names()) == sorted(name for name, _, _ in leaves)
    for name, field, _ in leaves:
        assert f"\n  {name}=" in text
        assert " ".join(field.metadata["help"].split()) in unwrapped
        for choice in field.metadata["choices"] or ():
            assert choice in text
    assert "vae.train.lr=2e-05" in text  # a section's own default, not the class's


def test_overrides_beat_the_file_which_beats_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "vae:\n  beta: 0.5\n  train: {lr: 1e-3, max_steps: 7}\nrun:\n")
    config = load_config(str(path), ["vae.beta=1e-2", "vae.train.max_epochs=null", "vae.beta=2e-2"])
    assert config.vae.beta == 0.02
    assert config.vae.train.lr == 1e-3
    assert config.vae.train.max_steps == 7
    assert config.vae.train.max_epochs is None
    assert config.denoiser == Config().denoiser


def test_values_are_read_as_the_setting_says() -> None:
    config = load_config(
        None,
        [
            "run.name=007",
            "vae.train.lr=1",
            "backbone.lora.targets=[a,b]",
            "data.answer_prefixes=['#### ', 'So: x=']",
            "ar.from_scratch=false",
            "backbone.scratch={model_type: llama, rope: {a: 1}}",
            "backbone.scratch.hidden_size=32",
            "backbone.scratch.rope.b=2",
            "data.train=a=b.jsonl",
            "data.test=${run.name}/test.jsonl",
        ],
    )
    assert isinstance(config.vae.train.lr, float)
    assert config.backbone.lora.targets == ["a", "b"]
    assert config.data.answer_prefixes == ["#### ", "So: x="]
    assert config.backbone.scratch == {"model_type": "llama", "rope": {"a": 1, "b": 2}, "hidden_size": 32}
    assert config.data.train == "a=b.jsonl"
    assert config.data.test == f"{config.run.name}/test.jsonl"


TEXTS = ["1E3", "no", "on", "007", "1:30", "0x10", "1_000", "2026-01-02", ".5", "1.", "true", "null-like", "~a", "é ü"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_setting_keeps_its_text(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"run:\n  name: {text}\n  folder: {text}/x\nbackbone: {{lora: {{targets: [{text}, q]}}}}\n")
    for config in (
        load_config(str(path)),
        load_config(None, [f"run.name={text}", f"run.folder={text}/x", f"backbone.lora.targets=[{text}, q]"]),
        load_config(None, [f"run={{name: {text}, folder: {text}/x}}", f"backbone.lora.targets=[{text}, q]"]),
    ):
        assert (config.run.name, config.run.folder) == (text, f"{text}/x")
        assert config.backbone.lora.targets == [text, "q"]
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(str(tmp_path / "saved.yaml")) == config


def test_a_text_on_the_command_line_is_what_was_typed(tmp_path: Path) -> None:
    typed = {
        "data.train": "my #1: file.jsonl",
        "data.test": "@x",
        "run.name": "*a",
        "data.validation": "&b c",
        "run.folder": "- d",
    }
    config = load_config(None, [f"{name}={text}" for name, text in typed.items()])
    found = dict(values(config))
    assert {name: found[name] for name in typed} == typed
    assert load_config(None, ["data.train=null"]).data.train is None
    assert load_config(None, ["data.train='null'", "data.test=\"a: 'b'\""]).data.test == "a: 'b'"
    assert "must be text" in errors_of("run.name=null")[0] and "must be text" in errors_of("run.name={a: 1}")[0]
    path = write(tmp_path, "base: &b {name: no, folder: on}\nrun: {<<: *b, name: 007}\n")
    with pytest.raises(ConfigError, match="unknown setting base"):
        load_config(str(path))
    path = write(tmp_path, "run: {<<: [{name: no, folder: on}, {name: off}], seed: 1}\n")
    assert (load_config(str(path)).run.name, load_config(str(path)).run.folder) == ("no", "on")


def test_all_errors_are_reported_at_once_with_place_and_closest_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "vae:\n  latent_dims: 3\n  beta: foo\n  train:\n    lrr: 3\nbogus: 3\ndenoiser: {objective: x1}\nlatents: 5\n",
    )
    errors = errors_of(
        "denoiser.train.ema=2",
        "max_blocks=3",
        "noequals",
        "run.name=[a",
        "run.folder=${run.nam}",
        "ar.copy_fraction=yes please",
        "evaluate.methods=[ladirr]",
        path=path,
    )
    expected = {
        "unknown vae.latent_dims": (f"{path}:2", "unknown setting vae.latent_dims", "vae.latent_dim?"),
        "type": (f"{path}:3", "vae.beta=foo", "must be a number"),
        "unknown nested": (f"{path}:5", "vae.train.lrr", "vae.train.lr?"),
        "unknown section": (f"{path}:6", "unknown setting bogus"),
        "section as value": (f"{path}:8", "latents is a section"),
        "choice": ("denoiser.objective=x1", "velocity, x0, epsilon, v"),
        "range": ("denoiser.train.ema=2", "at least 0 and below 1"),
        "unknown by last part": ("command line", "unknown setting max_blocks", "data.max_blocks?"),
        "no value": ("'noequals'", "section.key=value"),
        "yaml": ("run.name", "not valid YAML"),
        "interpolation": ("run.folder", "run.nam"),
        "type on the command line": ("command line", "ar.copy_fraction=yes please"),
        "choice in a list": ("evaluate.methods=ladirr", "did you mean ladir?"),
    }
    for what, parts in expected.items():
        assert any(all(part in error for part in parts) for error in errors), f"{what}: {parts} not in {errors}"
    assert len(errors) == len(expected)


def test_a_file_of_settings_without_its_option_is_told_so() -> None:
    (error,) = errors_of("configs/my.yaml")
    assert error.endswith("a file of settings stands behind --config")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("run.seed=1.5", "must be a whole number"),
        ("run.seed=true", "must be a whole number"),
        ("run.seed=null", "must be a whole number"),
        ("run.seed=-1", "at least 0"),
        ("vae.train.max_steps=2.5", "must be a whole number, or null"),
        ("vae.train.max_steps=0", "above 0"),
        ("vae.beta=.nan", "finite"),
        ("vae.beta=.inf", "finite"),
        ("ar.from_scratch=maybe", "true or false"),
        ("backbone.lora.targets=q_proj", "must be a list, each text, e.g. backbone.lora.targets=[q_proj]"),
        ("backbone.lora.targets=[{a: 1}]", "must be a list, each text"),
        ("backbone.scratch=llama", "must be a mapping"),
        ("run.name=a/b", "run.folder"),
        ("run.name=", "run.name"),
        ("deepspeed.stop_signal=KILL", "USR2"),
        ("deepspeed.step_timeout_minutes=0", "above 0"),
        ("plan.samples=0", "at least 1"),
        ("data.answer_prefixes=['']", "empty prefix"),
        ("data.answer_prefixes=[]", "name at least one"),
        ("denoiser.timestep_features=7", "even"),
        ("denoiser.token_focus=0.5", "no finite gradient"),
        ("countdown.min_target=101", "countdown.max_value=100"),
        ("evaluate.methods=[ar,ar]", "twice"),
    ],
)
def test_a_wrong_value_is_refused(override: str, part: str) -> None:
    errors = errors_of(override)
    assert len(errors) == 1
    assert part in errors[0]
    assert override.partition("=")[0] in errors[0]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["vae.train.max_epochs=null"], "would never end"),
        (["vae.train.schedule=wsd", "vae.train.warmup_fraction=0.5", "vae.train.decay_fraction=0.6"], "1.1"),
        (["ar.from_scratch=true", "backbone.tokenizer=t"], "model_type"),
        (["ar.from_scratch=true", "backbone.scratch.model_type=llama"], "backbone.tokenizer"),
        (["backbone.lora.rank=4", "backbone.lora.targets=[]"], "no layer"),
        (["sample.guidance_scale=4", "denoiser.condition_dropout=0"], "condition_dropout above 0"),
        (["sample.guidance_interval=[0.2,1.5]"], "must be two times, [low, high]"),
        (["ar.train.heads_lr_factor=5"], "an LM alone, which has no fresh heads"),
        (["ar.copy_fraction=0.1"], "data.train"),
        (["denoiser.context=text"], "set rollout.enabled=false"),
        (["denoiser.context=text", "rollout.enabled=false", "sample.max_thought_tokens=9"], "denoiser.context=text a longer"),
        (["denoiser.lm_weight=1"], "no sentence stands as text whose tokens"),
        (["denoiser.context=text", "rollout.enabled=false", "sample.lm_weight=1"], "whose LM was trained on sentences, too"),
        (["data.output_field=input"], "a record needs a field for each"),
        (["countdown.min_target=50", "countdown.max_target=40"], "countdown.max_target=40"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(overrides: list[str], part: str) -> None:
    errors = errors_of(*overrides)
    assert len(errors) == 1
    assert part in errors[0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in errors_of(path=tmp_path / "absent.yaml")[0]
    for text in ["- a\n", "text\n", "3\n"]:
        assert "must hold sections" in errors_of(path=write(tmp_path, text))[0]
    for text in ["a: [", "vae: {beta: 1, beta: 2}\n", "\x00"]:
        assert "not valid YAML" in errors_of(path=write(tmp_path, text))[0]
    (tmp_path / "config.yaml").write_bytes(b"run: {name: \xff}")
    assert "not valid YAML" in errors_of(path=tmp_path / "config.yaml")[0]
    assert load_config(str(write(tmp_path, ""))) == Config()


def test_a_stored_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(
        None, ["run.name=null-like", "data.train=null", "data.test='null'", "vae.beta=1e-7", "backbone.scratch.a=[1]"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert config.data.test == "null"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "run: {name: a}\n")
    for argv in [
        ["--local_rank=1", "--config", str(path), "run.seed=3"],
        ["run.seed=3", "--local-rank", "1", f"--config={path}"],
    ]:
        config, arguments = parse_args(argv, "does things")
        assert (config.run.name, config.run.seed) == ("a", 3)
        assert arguments.config == str(path)

    _, arguments = parse_args(["--extra=7"], "does things", lambda parser: parser.add_argument("--extra", type=int))
    assert arguments.extra == 7

    with pytest.raises(SystemExit) as caught:
        parse_args(["--vae.train.lr=3", "--confg", "vae.betta=3"], "does things")
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "without dashes: vae.train.lr=VALUE" in message
    assert "--confg" in message
    assert "did you mean vae.beta?" in message

    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"], "does things")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "does things" in text
    assert all(f"{name}=" in text for name in setting_names())


def test_every_number_has_a_range_and_every_range_a_number() -> None:
    numbers = [name for name, field, _ in fields(Config()) if field.type.startswith(("int", "float"))]
    first = {name: next((pattern for pattern, _ in RANGES if fnmatchcase(name, pattern)), None) for name in numbers}
    assert {pattern for pattern, _ in RANGES} <= set(first.values())
    assert [name for name, pattern in first.items() if pattern is None] == ["denoiser.timestep_mean"]


def test_ranges_know_their_ends() -> None:
    closed, half_open = Range(at_least=0, at_most=1), Range(above=0, below=1)
    assert [closed.holds(x) for x in (-0.1, 0, 1, 1.1)] == [False, True, True, False]
    assert [half_open.holds(x) for x in (0, 0.5, 1)] == [False, True, False]
    assert str(closed) == "at least 0 and at most 1"


def test_values_lists_every_setting() -> None:
    assert sorted(name for name, _ in values(Config())) == sorted(setting_names())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load_config(str(path))


@pytest.mark.parametrize("path", [None, *sorted(CONFIGS.glob("*.yaml"))], ids=lambda path: path.stem if path else "defaults")
def test_what_may_be_trained_on_may_be_generated(path: Path | None) -> None:
    config = load_config(None if path is None else str(path))
    assert config.sample.max_blocks >= config.data.max_blocks
    assert config.sample.max_answer_tokens >= config.data.max_answer_tokens


def test_some_configurations_are_shipped() -> None:
    assert {"demo", "gsm8k"} <= {path.stem for path in CONFIGS.glob("*.yaml")}


def test_settings_without_effect_are_named_with_what_they_need() -> None:
    carried = ["rollout.carry_gradient=true", "sample.restart_keeps_state=true", "denoiser.carry_own_rollout=0.5"]
    told = list(idle_settings(load_config(None, [*carried, "sample.spacing_power=3", "denoiser.token_focus=2"])))
    assert len(told) == 5 and sum("needs denoiser.carry=hidden" in remark for remark in told) == 3
    assert "denoiser.token_focus=2.0 has no effect; it needs denoiser.token_weight above 0" in told
    assert not list(idle_settings(load_config(None, [*carried, "denoiser.carry=hidden"])))
    assert not list(idle_settings(Config()))
    for pattern, *_ in _NEEDS:
        assert any(fnmatchcase(name, pattern) for name, _ in values(Config()))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_set_nothing_without_effect(path: Path) -> None:
    assert not list(idle_settings(load_config(str(path), [])))
