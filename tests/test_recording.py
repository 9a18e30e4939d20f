"""The log: rows as decided, readable while growing and after a crash, replayed bit for bit, what-if, four threads."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import two_loggers
from subjects import subject
from toys import launched

import surgery
from surgery.context import state_of, tape
from surgery.errors import ForceError, LogError
from surgery.gates import iter_gates
from surgery.log_rows import input_hashes, rows_of

pytest.importorskip("pyarrow", reason="logs are Arrow files")

NAMES = ["timm/vit_pico", "timm/test_resnet", "transformers/bert"]


def batches(name: str, sizes: tuple[int, ...] = (3, 2, 4)) -> list:
    return [subject(name).entry.example(size, seed=seed) for seed, size in enumerate(sizes)]


@torch.no_grad()
def run(gated: torch.nn.Module, batch: object) -> None:
    gated(**batch) if isinstance(batch, dict) else gated(batch)


def recorded(name: str, path: Path, **options: object) -> surgery.Log:
    gated = subject(name).gated
    with surgery.execution(gated, "skip"), surgery.record(gated, path, **options):
        for batch in batches(name):
            run(gated, batch)
    return surgery.read_log(path)


def test_a_log_lies_among_no_other_files(tmp_path: Path) -> None:
    name = NAMES[0]
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(LogError, match=r"holds thesis\.tex, so it is no log's"):
        recorded(name, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").rename(tmp_path / ".hidden")
    assert len(recorded(name, tmp_path).parts()) == 1
    assert len(recorded(name, tmp_path).parts()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_rows_hold_what_the_tape_saw(name: str, tmp_path: Path) -> None:
    gated = subject(name).gated
    calls = list(recorded(name, tmp_path).calls())
    assert [len(rows) for rows in calls] == [3, 2, 4]
    for rows, batch in zip(calls, batches(name), strict=True):
        with surgery.execution(gated, "skip"), tape(gated) as events:
            run(gated, batch)
        for index, row in enumerate(rows):
            (taken,) = row.passes
            assert [one.site for one in taken] == [event.site for event in events]
            for one, event in zip(taken, events, strict=True):
                assert torch.equal(one.values, event.decisions[index])
                assert torch.equal(one.scores, event.scores[index].float())
                real = (
                    event.decisions[index]
                    if event.weights is None
                    else event.decisions[index][event.weights[index].bool()]
                )
                assert row.rates()[one.site] == pytest.approx(float(real.float().mean()))
            padded = any(not bool(one.real.all()) for one in taken if one.real is not None)
            assert padded == (name == "transformers/bert" and index > 0)
            assert row.size == len(rows) and row.row == index and row.latency_ms > 0


def test_cost_is_that_of_measure(tmp_path: Path) -> None:
    name = "timm/vit_pico"
    rows = list(recorded(name, tmp_path))
    gated = subject(name).gated
    with surgery.execution(gated, "skip"):
        report = surgery.measure(gated, batches(name), dense=subject(name).model, speed=(), peers=False)
    assert sum(row.cost for row in rows) / len(rows) == pytest.approx(report.cost, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_replay_is_bit_equal_on_the_same_batches(name: str, tmp_path: Path) -> None:
    log = recorded(name, tmp_path)
    found = surgery.replay(subject(name).gated, log, batches(name))
    assert found.exact and found.faithful
    assert found.rows == found.same_batches == found.equal == 9 and found.changed == 0


def test_replay_of_regrouped_rows_is_close(tmp_path: Path) -> None:
    log = recorded("timm/vit_pico", tmp_path)
    rows = torch.cat(batches("timm/vit_pico"))
    found = surgery.replay(subject("timm/vit_pico").gated, log, [rows[[8, 0, 5]], rows[[1, 2, 3, 4, 6, 7]]])
    assert found.faithful and found.rows == found.close == 9 and found.same_batches == 0


def test_replay_names_the_site_from_which_on_things_differ(tmp_path: Path) -> None:
    log = recorded("timm/vit_pico", tmp_path)
    gated = copy.deepcopy(subject("timm/vit_pico").gated)
    names = state_of(gated).names
    for parameter in dict(iter_gates(gated))[names[1]].skip_path.parameters():
        parameter.data += 0.3
    found = surgery.replay(gated, log, batches("timm/vit_pico"))
    assert not found.exact and found.differing and {one.site for one in found.differing} == {names[2]}
    assert names[2] in str(found)


def test_what_if(tmp_path: Path) -> None:
    log = recorded("timm/vit_pico", tmp_path)
    gated = subject("timm/vit_pico").gated
    dearest = max(state_of(gated).names, key=lambda name: state_of(gated).costs.sites[name].branch)
    dearer = surgery.replay(gated, log, batches("timm/vit_pico"), opened=[dearest])
    cheaper = surgery.replay(gated, log, batches("timm/vit_pico"), closed=[dearest])
    assert cheaper.cost < cheaper.recorded_cost < dearer.cost
    with pytest.raises(ForceError, match="no site named"):
        surgery.replay(gated, log, batches("timm/vit_pico"), opened=["nosuch"])
    with pytest.raises(ForceError, match=f"{dearest} cannot be forced both open and closed"):
        surgery.replay(gated, log, batches("timm/vit_pico"), opened=[dearest], closed=[dearest])


def test_replay_refuses_another_model_and_other_data(tmp_path: Path) -> None:
    log = recorded("timm/vit_pico", tmp_path)
    with pytest.raises(LogError, match="recorded from a model with the sites"):
        surgery.replay(subject("timm/test_resnet").gated, log, batches("timm/test_resnet"))
    with pytest.raises(LogError, match="none of the 9 recorded inputs"):
        surgery.replay(subject("timm/vit_pico").gated, log, [subject("timm/vit_pico").entry.example(2, seed=99)])


def test_recording_changes_no_output_and_dense_calls_stay_dense(tmp_path: Path) -> None:
    one = subject("timm/vit_pico")
    x = one.entry.example(2, seed=5)
    with torch.no_grad(), surgery.record(one.gated, tmp_path):
        with surgery.execution(one.gated, "dense"):
            assert torch.equal(one.gated(x), one.model(x))
        with surgery.force(one.gated, 0.5):
            inside = one.gated(x)
    with torch.no_grad(), surgery.force(one.gated, 0.5):
        assert torch.equal(one.gated(x), inside)
    dense, forced = surgery.read_log(tmp_path).calls()
    assert all(row.passes == () and row.cost == 1 and row.execution == "dense" for row in dense)
    assert all(decision.scores is None for row in forced for decision in row.passes[0])


def test_padding_does_not_change_an_inputs_hash() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    long = surgery.calling.as_batch({"input_ids": ids, "attention_mask": mask})
    short = surgery.calling.as_batch({"input_ids": ids[:, :3], "attention_mask": mask[:, :3]})
    other = surgery.calling.as_batch({"input_ids": ids + 1, "attention_mask": mask})
    assert input_hashes(long) == input_hashes(short) != input_hashes(other)


def test_readable_while_growing_and_names_of_ones_own(tmp_path: Path) -> None:
    one = subject("timm/vit_pico")
    with torch.no_grad(), surgery.execution(one.gated, "skip"), surgery.record(one.gated, tmp_path) as log:
        log.name_inputs(["a", "b"])
        one.gated(one.entry.example(2, seed=1))
        log.flush()
        assert [row.input for row in surgery.read_log(tmp_path)] == ["a", "b"]
        one.gated(one.entry.example(2, seed=1))
    assert len(list(surgery.read_log(tmp_path))) == 4


def test_names_belong_to_the_next_call_alone(tmp_path: Path) -> None:
    one = subject("timm/vit_pico")
    x = one.entry.example(2, seed=1)
    with torch.no_grad(), surgery.execution(one.gated, "skip"), surgery.record(one.gated, tmp_path) as log:
        log.name_inputs(["a", "b"])
        with pytest.raises(RuntimeError):
            one.gated(x[:, :1])
        one.gated(x)
        log.name_inputs(["a", "b", "c"])
        with pytest.raises(LogError, match="3 names were given for 2 inputs"):
            one.gated(x)
        one.gated(x)
        log.name_inputs(["d", "e"])
        one.gated(x)
    hashes = input_hashes(surgery.calling.as_batch(x))
    assert [row.input for row in surgery.read_log(tmp_path)] == [*hashes, *hashes, "d", "e"]


def test_what_is_written_into_inputs_and_outputs_later_is_not_recorded(tmp_path: Path) -> None:
    one = subject("timm/vit_pico")
    x = one.entry.example(2, seed=1)
    hashes = input_hashes(surgery.calling.as_batch(x))
    gated = one.gated
    started, go = threading.Event(), threading.Event()

    def held(*args: object) -> dict:
        started.set()
        assert go.wait(60)
        return rows_of(*args)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), surgery.execution(gated, "skip"):
        patch.setattr("surgery.log_writing.rows_of", held)
        with surgery.record(gated, tmp_path):
            output = gated(x)
            assert started.wait(60)
            expected = output.clone()
            output.zero_()
            x.zero_()
            go.set()
    rows = list(surgery.read_log(tmp_path))
    assert [row.input for row in rows] == hashes
    torch.testing.assert_close(torch.stack([torch.as_tensor(row.output) for row in rows]), expected)


def within(seconds: float, step: Callable[[], None]) -> None:
    """Run `step` in a thread that is given up on after that long; what it raises is raised here."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            step()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]


def test_a_closed_log_takes_no_calls_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    one = subject("timm/vit_pico")
    x = one.entry.example(1, seed=1)
    with torch.no_grad(), surgery.execution(one.gated, "skip"), surgery.record(one.gated, tmp_path) as log:
        one.gated(x)
        within(30, log.close)
    within(30, log.close)
    within(30, log.flush)

    def late() -> None:
        with log.joined(), torch.no_grad(), surgery.force(one.gated, 0.5):
            one.gated(x)

    with pytest.raises(LogError, match="is closed; open another one with surgery.record"):
        within(30, late)
    assert len(list(surgery.read_log(tmp_path))) == 1


def test_callers_that_wait_for_a_slow_log_are_refused_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject("timm/vit_pico")
    x = one.entry.example(1, seed=1)
    monkeypatch.setattr("surgery.log_writing.WAITING", 1)
    done = []
    with surgery.record(one.gated, tmp_path) as log:

        def work() -> None:
            with log.joined(), torch.no_grad(), surgery.force(one.gated, 0.0), pytest.raises(LogError, match="closed"):
                while True:
                    one.gated(x)
                    done.append(1)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(done) < 20:
            time.sleep(0.01)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(list(surgery.read_log(tmp_path))) == len(done)


CRASH = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, surgery
from subjects import subject
one = subject("timm/vit_pico")
with torch.no_grad(), surgery.execution(one.gated, "skip"), surgery.record(one.gated, {path!r}) as log:
    one.gated(one.entry.example(3, seed=1))
    log.flush()
    one.gated(one.entry.example(3, seed=2))
    os._exit(9)
"""


def test_rows_on_disk_survive_a_crash(tmp_path: Path) -> None:
    code = CRASH.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list(surgery.read_log(tmp_path))) == 3
    recorded("timm/vit_pico", tmp_path)  # a second process's file beside it
    assert len(list(surgery.read_log(tmp_path))) == 12


def test_a_group_cut_off_in_the_middle_is_left_out(tmp_path: Path) -> None:
    (file,) = recorded("timm/vit_pico", tmp_path, rows=1).parts()
    content = file.read_bytes()
    counts = set()
    for end in range(len(content) - 1, 0, -211):
        file.write_bytes(content[:end])
        counts.add(len(list(surgery.read_log(tmp_path))))
    assert counts == {0, 3, 5, 9}


def test_four_threads_lose_nothing(tmp_path: Path) -> None:
    one = subject("timm/vit_pico")
    per_thread = 20

    with surgery.record(one.gated, tmp_path) as log:

        def work(number: int) -> None:
            with log.joined(), torch.no_grad(), surgery.force(one.gated, number / 3):
                for index in range(per_thread):
                    log.name_inputs([f"{number}/{index}"])
                    one.gated(one.entry.example(1, seed=number))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = list(surgery.read_log(tmp_path))
    assert sorted(row.input for row in rows) == sorted(f"{n}/{i}" for n in range(4) for i in range(per_thread))
    assert sorted(row.call for row in rows) == list(range(4 * per_thread))
    for row in rows:  # what one thread forced no other saw
        share = sum(row.rates().values()) / len(row.rates())
        assert {"0": share == 0, "3": share == 1}.get(row.input[0], 0 < share < 1), (row.input, share)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="holds no part"):
        surgery.read_log(tmp_path)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LogError, match="cannot write a log"),
        surgery.record(subject("timm/vit_pico").gated, tmp_path / "file"),
    ):
        pass
    with pytest.raises(LogError, match="2 names were given for 3 inputs"):
        one = subject("timm/vit_pico")
        with torch.no_grad(), surgery.record(one.gated, tmp_path / "log") as log:
            log.name_inputs(["a", "b"])
            one.gated(one.entry.example(3, seed=1))
    assert not list((tmp_path / "log").glob("*"))


def test_a_log_that_failed_closes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.log_writing.rows_of", lambda *_: 1 / 0)
    one = subject("timm/vit_pico")
    with pytest.raises(LogError, match="could not be written: division by zero"):
        with torch.no_grad(), surgery.record(one.gated, tmp_path / "log") as log:
            one.gated(one.entry.example(3, seed=1))
    with warnings.catch_warnings(record=True) as seen:  # an open file says so when it is collected
        warnings.simplefilter("always", ResourceWarning)
        del log
        gc.collect()
    assert not seen and not list((tmp_path / "log").glob("*"))


@pytest.mark.slow
def test_two_processes_write_one_log(tmp_path: Path) -> None:
    result = launched(two_loggers.__file__, str(tmp_path / "log"))
    assert result.returncode == 0, result.stderr[-3000:]
    log = surgery.read_log(tmp_path / "log")
    assert len(log.parts()) == 2 and len({one["process"] for one in log.metadata}) == 2
    assert len({one["gates_sha256"] for one in log.metadata}) == 1
    rows = list(log)
    assert {row.input for row in rows} == {f"input-{index}" for index in range(two_loggers.ROWS)}
    assert len(rows) == two_loggers.ROWS == len(log.table())
    assert [len([row for row in rows if row.part == part]) for part in (0, 1)] == [two_loggers.ROWS // 2] * 2
    gated, inputs = two_loggers.build()
    with torch.no_grad(), surgery.execution(gated, "skip"), tape(gated) as events:
        gated(inputs)
    for row in rows:
        (taken,) = row.passes
        index = int(row.input.removeprefix("input-"))
        assert [bool(one.values) for one in taken] == [bool(event.decisions[index]) for event in events]


GROWTH = """
import resource, sys, torch, surgery
from two_loggers import build
gated, _ = build()
batch = torch.randn(128, 8)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
with torch.no_grad(), surgery.execution(gated, "skip"), surgery.record(gated, sys.argv[1]) as log:
    for share in (1, 3):
        for _ in range(share * int(sys.argv[2]) // 128):
            gated(batch)
        log.flush()
        print(peak())
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="peak memory is asked of the operating system")
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "log"), "6400"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": folder})
    first, last = map(float, done.stdout.split())
    assert len(surgery.read_log(tmp_path / "log").table()) == 4 * 6400
    assert last - first < 8, f"peak memory grew from {first:.0f} to {last:.0f} MB over 19,200 more rows"
