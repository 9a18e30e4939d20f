"""The commands: what they print, write and refuse, on a tiny network and scikit-learn's digits."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from surgery import errors
from surgery.errors import SurgeryError, UnknownModel
from surgery.scripts.cli import app

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x.flatten(1))))


def make():
    torch.manual_seed(0)
    return Net()


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
COMMANDS = (
    *("sites", "show", "convert", "heal", "calibrate", "score", "compare", "benchmark", "export"),
    *("record", "replay", "audit", "report", "app", "doctor", "demo"),
)


def run(*arguments: Any, expect: int = 0) -> Any:
    """Run `surgery` in this process; the result's `stdout` and `stderr` are apart."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == expect, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def unboxed(text: str) -> str:
    """The words of an error of usage, which are shown in a box."""
    return " ".join(text.replace("│", " ").split())


def read_json(*arguments: Any) -> dict[str, Any]:
    """What `surgery … --json` prints: JSON alone."""
    value = json.loads(run(*arguments, "--json").stdout)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A `MODEL` string."""
    file = tmp_path_factory.mktemp("network") / "net.py"
    file.write_text(NETWORK, encoding="utf-8")
    return f"python:{file}:make"


def convert(network: str, out: Path, *more: Any, expect: int = 0) -> Any:
    """A conversion that takes a second."""
    common = ("--data", "digits", "--limit", 160, "--budget", 0.6, "--out", out)
    return run("convert", network, *common, *more, expect=expect)


@pytest.fixture(scope="module")
def converted(network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `surgery convert` wrote."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(network, out, "--tune", "oneshot", "--limit", 640)
    return out


def test_looks_of_the_trial_are_told_by_start_and_share(converted: Path) -> None:
    from surgery.scripts import looks_trial

    app = typer.Typer()
    app.command()(looks_trial.main)
    name = list(read_json("show", converted)["sites"])[-1]
    given = [str(converted), "--data", "digits", "--limit", "100", "--first", "0.6", "--start", name]
    lines = CliRunner().invoke(app, given, catch_exceptions=False).stdout.splitlines()
    whole, part = ([cell.strip() for cell in line.split("|")] for line in lines[2:])
    cost = float(whole[2])
    assert whole[4] == "the start" and part[4].startswith(name) and whole[3] == part[3]
    assert [float(cell.split("@")[1]) for cell in whole[5:9]] == pytest.approx(
        [cost + s for s in (0.05, 0.1, 0.15, 0.2)], abs=2e-3
    )
    assert all(float(a.split("@")[1]) > float(b.split("@")[1]) for a, b in zip(whole[5:9], part[5:9], strict=True))


def test_a_finished_conversion_is_healed_beside_itself(network: str, converted: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "healed", sorted((f.name, f.read_bytes()) for f in converted.iterdir())
    data = ("--data", "digits", "--limit", 640, "--out", out)
    refused = run("heal", converted, "--kind", "norms", *data, expect=1)  # a network without norms
    assert "take heal='lora'" in refused.stderr and not out.exists()
    pytest.importorskip("peft")
    common = (converted, "--kind", "lora", *data, "--steps", 30)
    notes = " ".join(read_json("heal", *common)["notes"])
    assert "healed (lora)" in notes or "healing (lora) did not improve" in notes
    assert sorted((f.name, f.read_bytes()) for f in converted.iterdir()) == before
    assert read_json("score", out, "--data", "digits", "--limit", 64, "--no-peers")["directory"] == str(out)
    assert "--force" in run("heal", *common, expect=1).stderr


def test_a_budget_holds_on_other_inputs(converted: Path, tmp_path: Path) -> None:
    data, out = ("--data", "digits", "--split", "test", "--limit", 200), tmp_path / "calibrated"
    made = read_json("calibrate", converted, *data, "--budget", 0.8, "--no-second-look", "--out", out)
    assert made["out"] == str(out) and made["budget"] == 0.8
    assert abs(read_json("score", out, *data, "--no-peers")["cost"] - 0.8) < 0.03
    assert "--force" in run("calibrate", converted, *data, "--out", out, expect=1).stderr


# -- help and usage ---------------------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_json_and_explains_itself(command: str) -> None:
    text = run(command, "--help").stdout
    assert "--json" in text and "--debug" in text


def test_an_option_takes_the_same_in_every_command() -> None:
    """Once or several times, and left out or not: `int`, `int | None` and `list[int]` take the same."""
    taken: dict[str, set[object]] = {}
    for page in app.registered_commands:
        for hint in get_type_hints(page.callback, include_extras=True).values():
            value, *more = get_args(hint) or (hint,)
            for info in (one for one in more if isinstance(one, OptionInfo)):  # its first name is its `default`
                kind = next(iter(get_args(value)), value)
                taken.setdefault(info.default, set()).add(next(iter(get_args(kind)), kind))
    assert taken["--budget"] == {float} and taken["--timed-batch"] == {int}
    assert {option: kinds for option, kinds in taken.items() if len(kinds) > 1} == {}


def test_version() -> None:
    from importlib.metadata import version

    assert run("--version").stdout.strip() == version("bypass-surgery")


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "timm:x"),
        ("nosuch",),
        ("sites", "timm:x", "--device", "abacus"),
        ("sites", "timm:x", "--device", "cuda:99"),
        ("sites", "timm:x", "--threads", "0"),
    ],
    ids=lambda value: " ".join(value),
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    run(*arguments, expect=2)


def test_an_error_of_a_device_names_its_option() -> None:
    for name in ("abacus", "cuda:99"):
        assert f"Invalid value for --device: '{name}'" in unboxed(
            run("sites", "timm:x", "--device", name, expect=2).stderr
        )


# -- named errors -----------------------------------------------------------------------------------------------------


def test_a_named_error_is_one_line_and_a_next_step() -> None:
    result = run("sites", "tim:resnet18", expect=1)
    first, second = result.stderr.strip().splitlines()
    assert first.startswith("UnknownModel: ") and "timm:resnet18" in first
    assert second.startswith("next: ")
    assert result.stdout == ""


def test_a_converted_directory_is_no_model(converted: Path) -> None:
    for more in (("sites",), ("convert", "--budget", 0.5, "--out", converted.with_name("new"))):
        said = run(more[0], converted, *more[1:], expect=1).stderr
        assert "`surgery show DIR` lists its sites" in said and "next:" not in said


def test_a_named_error_is_json_for_programs() -> None:
    value = json.loads(run("sites", "tim:resnet18", "--json", expect=1).stdout)
    assert value["error"] == "UnknownModel" and "timm:resnet18" in value["message"] and value["next"]


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(app, ["sites", "tim:resnet18", "--debug"])
    assert isinstance(result.exception, UnknownModel)


def test_every_hint_belongs_to_an_error() -> None:
    import surgery.errors
    from surgery.scripts.running import HINTS

    for name in HINTS:
        assert issubclass(getattr(surgery.errors, name), SurgeryError)


def test_every_hint_is_for_a_command() -> None:
    import typer

    from surgery.scripts.running import HINTS, TAKE_DIRECTORIES

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    takes = {name for name, page in commands.items() if any(one.name == "directory" for one in page.params)}
    assert takes == TAKE_DIRECTORIES
    assert {key for hints in HINTS.values() for key in hints} <= {*commands, "DIR", "MODEL", ""}


@pytest.mark.parametrize(
    ("command", "error", "hint"),
    [
        ("score", errors.CheckpointError("x is damaged"), "DIR is what `surgery convert` wrote"),
        ("convert", errors.CheckpointError("checkpoint x.pth does not exist"), None),
        ("score", errors.CheckpointError("x names none; give one with --model"), None),
        ("score", errors.DataError("no such file"), "`surgery score --help`"),
        ("benchmark", errors.DataError("no such file"), "`surgery benchmark --help`"),
        ("benchmark", errors.DataError("too few; take a smaller --timed-batch"), None),
        ("sites", errors.NoSites("nothing is named so"), None),
        ("convert", errors.NoSites("nothing"), "`surgery sites MODEL`"),
        ("convert", errors.UnknownModel("x"), "`surgery convert --help`"),
        ("score", errors.UnknownModel("x"), "--model names"),
        ("show", errors.UnknownSite("x"), "`surgery show DIR` lists"),
        ("convert", errors.PlanMismatch("x"), "`surgery sites MODEL`"),
        ("export", errors.ExportError("x"), "`surgery export --help`"),
        ("record", errors.LogError("cannot write"), None),
        ("replay", errors.LogError("no log"), "`surgery record DIR"),
        ("pull", errors.OutputExists("x exists"), None),
    ],
)
def test_hints_go_by_the_command_and_repeat_no_message(command: str, error: SurgeryError, hint: str | None) -> None:
    from surgery.scripts.running import hint_of

    found = hint_of(error, command)
    assert found is None if hint is None else found is not None and found.startswith(hint)


def test_hints_of_commands_that_fail(converted: Path, tmp_path: Path) -> None:
    missing = run("sites", "timm:test_vit?checkpoint=no.pth", expect=1).stderr
    assert "CheckpointError: " in missing and "next:" not in missing
    resumed = ("convert", "timm:x", "--budget", 0.5, "--out", tmp_path / "out", "--resume")
    assert "next:" not in run(*resumed, expect=1).stderr
    for command in ("score", "audit", "benchmark"):
        said = run(command, converted, "--data", tmp_path / "no.csv", expect=1).stderr
        assert f"next: `surgery {command} --help`" in said


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("audit", "--picture"),
        ("report", "--out"),
        ("export", "--out"),
        ("compare", "--out"),
        ("demo", "--out"),
        ("coverage", "--out"),
    ],
)
def test_outputs_are_refused_before_the_work(command: str, option: str, tmp_path: Path) -> None:
    """The directory of the conversion, which is read first of all, is not even there."""
    given = {"audit": ("no", "--data", "digits"), "report": ("no", "--data", "digits"), "export": ("no",)}
    start = (command, *given.get(command, given["audit"] if command == "compare" else ()))
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    inside = run(*start, option, tmp_path / "file" / "deep" / "out.png", expect=1).stderr
    assert f"{option} " in inside and "cannot be written: Not a directory; give another" in inside
    taken = run(*start, option, tmp_path, expect=1).stderr
    assert "OutputExists: " in taken and ("is a directory" in taken or "holds something else" in taken)
    assert [(one.name, one.read_text("utf-8")) for one in tmp_path.iterdir()] == [("file", "a file")]


# -- sites, show ------------------------------------------------------------------------------------------------------


def test_sites_prints_a_table(network: str) -> None:
    text = run("sites", network, "--data", "digits").stdout
    assert "Sites of Net" in text and "blocks.3.mlp" in text and "4 sites hold" in text


def test_sites_json_has_the_same(network: str) -> None:
    value = read_json("sites", network, "--data", "digits")
    assert [site["name"] for site in value["sites"]] == [f"blocks.{index}.mlp" for index in range(4)]
    # by hand: 2 * (64 * 32 + 4 * (32 * 128 + 128 * 32) + 32 * 10), one multiply-add = 2
    assert value["model_flops"] == 2 * (64 * 32 + 4 * 2 * 32 * 128 + 32 * 10)


def test_sites_can_be_chosen(network: str) -> None:
    value = read_json("sites", network, "--data", "digits", "--sites", "blocks.[01].*")
    assert len(value["sites"]) == 2
    assert "NoSites" in run("sites", network, "--data", "digits", "--sites", "nothing.*", expect=1).stderr


def test_own_networks_need_data(network: str) -> None:
    assert "DataError" in run("sites", network, expect=1).stderr


def test_show_prints_code(network: str, converted: Path) -> None:
    fresh = run("show", network, "blocks.0", "--data", "digits").stdout
    assert "def _branch_mlp" in fresh and "surgery_gates" in fresh
    assert run("show", converted, "blocks.0.mlp").stdout == fresh
    assert read_json("show", converted, "blocks.0")["code"].strip() == fresh.strip()


def test_show_lists_the_sites_where_no_name_is_given(network: str, converted: Path) -> None:
    names = [f"blocks.{index}.mlp" for index in range(4)]
    shown = run("show", converted)
    assert shown.stdout.split() == names and f"show {converted} blocks.0.mlp" in shown.stderr
    fresh = run("show", network, "--data", "digits")
    assert fresh.stdout.split() == names
    run(*shlex.split(fresh.stderr.partition("next: surgery ")[2]))
    assert read_json("show", converted) == {"sites": names}
    assert "UnknownSite: '' is neither" in run("show", converted, "", expect=1).stderr


def test_show_names_what_there_is(converted: Path) -> None:
    assert "blocks.0.mlp" in run("show", converted, "nothing", expect=1).stderr


# -- convert, score, benchmark ----------------------------------------------------------------------------------------


def test_convert_writes_a_directory_that_loads(network: str, converted: Path) -> None:
    import surgery.checkpoints

    assert {"surgery_config.json", "surgery.safetensors"} <= {file.name for file in converted.iterdir()}
    assert type(surgery.checkpoints.load(converted)).__name__ == "Net"
    assert not converted.with_name("out.tuning").exists()


def test_convert_says_what_it_set(network: str, tmp_path: Path) -> None:
    value = json.loads(convert(network, tmp_path / "out", "--tune", "oneshot", "--json").stdout)
    assert value["budget"] == 0.6 and abs(value["cost"] - 0.6) < 0.01
    assert [row["site"] for row in value["sites"]] == [f"blocks.{index}.mlp" for index in range(4)]
    assert value["out"] == str(tmp_path / "out")


def test_convert_takes_its_choices(network: str, tmp_path: Path) -> None:
    more = ("--tune", "oneshot", "--granularity", "sample", "--skip", "identity", "--sites", "blocks.[123].*")
    value = json.loads(convert(network, tmp_path / "out", *more, "--json").stdout)
    assert {row["skip_path"] for row in value["sites"]} == {"identity"}
    assert {row["granularity"] for row in value["sites"]} == {"sample"}
    assert len(value["sites"]) == 3


def test_convert_trains_down_to_the_lowest_budget(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def stop(*args: Any, **kwargs: Any) -> None:
        given.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.conversion.convert", stop)
    convert(network, tmp_path / "c", "--lowest-budget", 0.3, expect=130)
    assert given["options"].budgets == (0.3, 0.9)
    convert(network, tmp_path / "c", expect=130)
    assert given["options"].budgets is None
    above = convert(network, tmp_path / "c", "--lowest-budget", 0.7, expect=1)
    assert "BudgetError: --lowest-budget 0.7 is above --budget 0.6" in above.stderr
    assert "BudgetError" in convert(network, tmp_path / "c", "--lowest-budget", 1.5, expect=1).stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--tune", "oneshot", "--epochs", 3, "--data", "digits"), "--tune oneshot does not train"),
        (("--budget", 1, "--epochs", 3, "--data", "digits"), "--budget 1 runs dense"),
        (("--epochs", 3), "passes over --data, which is not given"),
        (("--width", 0.5, "--skip", "affine", "--data", "digits"), "--skip affine has none"),
    ],
)
def test_convert_refuses_options_that_contradict_others(options: tuple[Any, ...], why: str, tmp_path: Path) -> None:
    given = ("convert", "timm:no_such_model", "--budget", 0.5, "--out", tmp_path / "out")
    assert why in unboxed(run(*given, *options, expect=2).stderr)


def test_convert_says_which_options_change_nothing(network: str, tmp_path: Path) -> None:
    more = ("--tune", "oneshot", "--width", 0.5, "--routers", "shared")
    notes = json.loads(convert(network, tmp_path / "out", *more, "--json").stdout)["notes"]
    assert any(note.startswith("routers 'shared' change nothing") for note in notes)
    assert any(note.startswith("width 0.5 changes nothing") for note in notes)


def test_convert_puts_texts_of_like_length_together(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stop(*args: Any, **kwargs: Any) -> None:
        given.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr("surgery.adapters.load_data", stop)
    with pytest.raises(KeyboardInterrupt):
        from surgery.scripts.convert import read_data

        common = {"batch_size": 2, "limit": None, "seed": 0, "shuffle": True}
        read_data(None, "a.csv", "train", None, "", common=common, augment=False, whole_texts="auto")
    assert given["group_by_length"] is True and given["shuffle"] is True


def test_convert_shares_routers(tmp_path: Path) -> None:
    more = ("--data", "digits:16", "--tune", "oneshot", "--routers", "shared")
    value = json.loads(convert("python:surgery.scripts.digits_model:build", tmp_path / "out", *more, "--json").stdout)
    found = {row["site"]: row["router"] for row in value["sites"]}
    assert found == {f"blocks.{i}.{n}": r for i in range(6) for n, r in (("attn", "own"), ("mlp", f"blocks.{i}.attn"))}
    assert "common" in convert("timm:x", tmp_path / "other", "--routers", "common", expect=2).stderr


def test_convert_replaces_nothing_unasked(network: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(network, out, "--tune", "oneshot")
    before = (out / "surgery_config.json").read_bytes()
    assert "OutputExists" in convert(network, out, expect=1).stderr
    assert (out / "surgery_config.json").read_bytes() == before
    convert(network, out, "--tune", "oneshot", "--force", "--sites", "blocks.[123].*")
    assert (out / "surgery_config.json").read_bytes() != before


def test_force_replaces_conversions_only(network: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    for more in ((), ("--force",)):
        refused = convert(network, tmp_path, *more, expect=1).stderr
        assert "OutputExists" in refused and "no converted model" in refused and "--force" not in refused
        assert "give another --out" in run("pull", "me/net", "--out", tmp_path, *more, expect=1).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("command", ["convert", "heal"])
def test_a_directory_that_cannot_be_written_is_refused_before_the_work(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    more = {"convert": ("timm:no_such_model", "--budget", 0.5), "heal": (tmp_path / "no", "--kind", "lora")}[command]
    refused = run(command, *more, "--data", "digits", "--out", tmp_path / "file" / "out", expect=1).stderr
    assert "CheckpointError: --out " in refused and "cannot be written: Not a directory" in refused
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("budget", ["0", "1.5", "-1", "nan"])
def test_convert_refuses_budgets_before_it_loads_anything(budget: str, tmp_path: Path) -> None:
    result = run("convert", "timm:no_such_model", "--budget", budget, "--out", tmp_path / "out", expect=1)
    assert "BudgetError" in result.stderr


def test_a_model_without_sites_is_refused(network: str, tmp_path: Path) -> None:
    plain = network.replace(":make", ":plain")
    result = run("convert", plain, "--data", "digits", "--budget", 0.5, "--out", tmp_path / "out", expect=1)
    assert result.stderr.splitlines()[-2].startswith("NoSites: ")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_during_tuning_can_be_resumed(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "out", tmp_path / "out.tuning"
    with monkeypatch.context() as patch:
        patch.setattr("surgery.scripts.convert.progress_bars", interrupting("training"))
        patch.setattr("sys.argv", ["surgery", "convert", network, "--out", str(out)])
        result = convert(network, out, "--tune", "train", expect=130)
    assert "Go on with: " in result.stderr and result.stderr.strip().endswith("--resume")
    assert work.is_dir() and not out.exists()

    convert(network, out, "--tune", "train", "--resume")
    assert out.is_dir() and not work.exists()


def test_ctrl_c_before_tuning_says_so(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.scripts.convert.progress_bars", interrupting("fitting"))
    assert "nothing was written" in convert(network, tmp_path / "out", expect=130).stderr
    assert not list(tmp_path.iterdir())


def test_resume_needs_something_to_resume(network: str, tmp_path: Path) -> None:
    assert "CheckpointError" in convert(network, tmp_path / "out", "--resume", expect=1).stderr


def interrupting(stage: str) -> Callable[[], Any]:
    """Progress bars that press Ctrl-C after two steps of the first stage whose name begins with `stage`."""

    @contextmanager
    def bars() -> Iterator[Callable[[str, int, int | None], None]]:
        def report(name: str, done: int, total: int | None) -> None:
            if name.startswith(stage) and done >= 2:
                raise KeyboardInterrupt

        yield report

    return bars


def test_score_reports_quality_cost_and_peers(converted: Path) -> None:
    value = read_json("score", converted, "--data", "digits", "--limit", 100)
    assert value["samples"] == 100
    assert set(value["metric"]) == {"accuracy"} == set(value["dense_metric"])
    assert 0 < value["cost"] < 1
    assert {peer["name"] for peer in value["peers"]} >= {"static", "random"}
    text = run("score", converted, "--data", "digits", "--limit", 100, "--no-peers").stdout
    assert "accuracy" in text and "static" not in text.split("note:")[0]


def test_score_at_another_budget_costs_less(converted: Path) -> None:
    high, low = (
        read_json("score", converted, "--data", "digits", "--limit", 100, "--no-peers", "--budget", budget)
        for budget in (0.8, 0.4)
    )
    assert low["cost"] < 0.6 < high["cost"]
    assert "range" in run("score", converted, "--data", "digits", "--budget", 0.001, expect=1).stderr


def test_score_says_that_no_labels_were_recognised(converted: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"foo": [float(i == j) for j in range(64)], "bar": i % 10}) for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    done = run("score", converted, "--data", tmp_path / "rows.jsonl", "--no-peers")
    assert "no column of labels was recognised among bar, so quality is agreement" in done.stderr
    assert "no column" not in run("score", converted, "--data", "digits", "--limit", 64, "--no-peers").stderr


def test_score_refuses_what_is_no_conversion(tmp_path: Path) -> None:
    assert "CheckpointError" in run("score", tmp_path, "--data", "digits", expect=1).stderr


def test_benchmark_times_every_batch_size(converted: Path) -> None:
    more = ("--data", "digits", "--timed-batch", 1, "--timed-batch", 4, "--repeats", 3)
    value = read_json("benchmark", converted, *more)
    assert set(value["speed"]) == {"1", "4"}
    assert all(one["median"] > 0 and one["repeats"] == 3 for one in value["speed"].values())
    assert value["conditions"]["device"] == "cpu"
    assert "gated ms" in run("benchmark", converted, *more).stdout


def test_benchmark_groups_texts_where_it_is_asked_to(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.adapters

    given: list[bool] = []
    load = surgery.adapters.load_data

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["group_by_length"])
        return load(*args, **kwargs)

    monkeypatch.setattr("surgery.adapters.load_data", noted)
    common = ("--data", "digits", "--timed-batch", 4, "--repeats", 2)
    run("benchmark", converted, *common)
    run("benchmark", converted, *common, "--group-by-length")
    assert given == [False, True]


def test_benchmark_needs_enough_samples(converted: Path) -> None:
    result = run("benchmark", converted, "--data", "digits", "--timed-batch", 501, expect=1)
    assert "fewer than 501" in result.stderr


def test_progress_is_one_line_per_stage_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from surgery.scripts.bars import progress_bars

    with progress_bars() as progress:
        for done in range(3):
            progress("first", done, 3)
        progress("second [red]", 0, None)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == ["first … (3 steps)", "second [red] …"]


# -- doctor, demo -----------------------------------------------------------------------------------------------------


def test_doctor_finds_its_own_version_and_passes_its_self_test() -> None:
    value = read_json("doctor")
    assert value["versions"]["torch"] and value["versions"]["bypass-surgery"]
    assert value["devices"][0].startswith("cpu")
    assert not [one for one in value["findings"] if "self-test" in one["what"]]
    assert "What will not work here" in run("doctor").stdout


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.scripts.doctor.installed", lambda name: None if name == "matplotlib" else "1.0")
    findings = read_json("doctor")["findings"]
    assert any("matplotlib" in one["what"] and "bypass-surgery[plot]" in one["remedy"] for one in findings)


def test_doctor_knows_what_every_extra_brings() -> None:
    from importlib.metadata import requires

    from surgery.scripts.doctor import OPTIONAL

    wanted = re.findall(r"^([\w-]+)\b.*extra == \"(\w+)\"$", "\n".join(requires("bypass-surgery") or ()), re.MULTILINE)
    brought = {(name, extra) for name, extra in wanted if extra not in ("dev", "all") and name != "bypass-surgery"}
    assert brought == {(name, extra) for name, (extra, _) in OPTIONAL.items()}


@pytest.mark.slow
def test_demo_writes_a_picture_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from surgery.scripts import demo, digits_model

    whole = digits_model.train
    monkeypatch.setattr(digits_model, "train", lambda *data, **options: whole(*data, **options, epochs=2))
    monkeypatch.setattr(demo, "BUDGETS", ())
    monkeypatch.setattr(demo, "TIMED", (1,))
    monkeypatch.setattr(demo, "_convert", oneshot)
    out = tmp_path / "demo"
    value = read_json("demo", "--out", out)
    assert {file.name for file in out.iterdir()} == set(demo.OURS)
    assert (out / "demo.png").stat().st_size > 10_000
    assert [row["budget"] for row in value["sweep"]] == [0.5]
    assert json.loads((out / "demo.json").read_text())["headline"]["samples"] == 500
    read_json("score", out / "gated", "--data", "digits:16", "--limit", 50, "--no-peers")


def oneshot(dense: Any, budget: float, seed: int, progress: Any) -> Any:
    """The demo's conversion on a part of its data, without training."""
    from surgery.conversion import convert as convert_model
    from surgery.scripts import demo

    return convert_model(dense, budget, data=demo._batches("train")[:6], tune="oneshot", seed=seed, progress=progress)


def test_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert "OutputExists" in run("demo", "--out", tmp_path, expect=1).stderr


# -- export -----------------------------------------------------------------------------------------------------------


def test_export_writes_a_program(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.pt2"
    done = read_json("export", converted, "--out", out, "--execution", "mask", "--batch-size", 2, "--data", "digits:8")
    assert done["format"] == "pt2" and done["bytes"] == out.stat().st_size
    assert next(iter(done["inputs"].values()))[0] == 2
    assert "exists" in run("export", converted, "--out", out, "--data", "digits:8", expect=1).stderr
    text = run("export", converted, "--out", out, "--execution", "static", "--force", "--data", "digits:8").stdout
    assert "execution static" in text and "left out" in text


# -- record and replay ------------------------------------------------------------------------------------------------


def test_what_was_recorded_is_replayed_bit_for_bit(converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    log, data = tmp_path / "log", ("--data", "digits", "--limit", 70)
    assert read_json("record", converted, *data, "--out", log)["rows"] == 70
    found = read_json("replay", log, "--from", converted, *data)
    assert found["faithful"] and found["equal"] == 70
    site = found["recorded_cost"] and read_json("score", converted, *data, "--no-peers")["active_rate"]
    dearer = read_json("replay", log, "--from", converted, *data, "--open", next(iter(site)))
    assert dearer["cost"] >= found["cost"]
    assert "bit-equal: 70" in run("replay", log, "--from", converted, *data).stdout
    assert "no site named" in run("replay", log, "--from", converted, *data, "--close", "x", expect=1).stderr


def test_record_says_what_replays_it(converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    more = ("--limit", 20, "--batch-size", 10, "--dtype", "float32", "--threads", 1)
    said = run("record", converted, "--data", "digits", *more, "--out", tmp_path / "a log").stderr
    replayed = run(*shlex.split(said.partition("next: surgery ")[2])).stdout
    assert "0 recorded rows are not in the data" in replayed and "batches as recorded: 20 rows" in replayed


def test_a_log_has_a_directory_of_its_own(converted: Path) -> None:
    pytest.importorskip("pyarrow")
    before = sorted(converted.iterdir())
    refused = run("record", converted, "--data", "digits", "--limit", 2, "--out", converted, expect=1).stderr
    assert "LogError: " in refused and "holds surgery.safetensors, surgery_config.json, so it is no log's" in refused
    assert "loading" not in refused and sorted(converted.iterdir()) == before


def test_audit_by_class_and_group(converted: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "audit.png"
    options = ("--limit", 100, "--group", "label", "--picture", picture)
    found = read_json("audit", converted, "--data", "digits", *options)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["inputs"] == 100 and len(found["sites"]) == 4
    assert [row["group"] for row in found["groups"]] == [str(digit) for digit in range(10)]
    assert (
        "Errors introduced" in run("audit", converted, "--data", "digits", "--limit", 100).stdout or not found["errors"]
    )
    assert "no column" in run("audit", converted, "--data", "digits", "--group", "x", expect=1).stderr
