"""What ``benchmarks.linear`` does without a GPU: its options, its rows with peers that work or do not, its table."""

import itertools
import json
import pathlib

import pytest
import torch

from benchmarks import _command, linear
from fusionpasses.ops import _mxfp4


class FakePeer:
    """The product of what the weight means, off by a factor; prepares once for each weight."""

    def __init__(self, factor=1.0, fails=False):
        self.factor, self.fails, self.prepared = factor, fails, 0

    def prepare(self, codes, scales):
        self.prepared += 1
        return _mxfp4.dequantize(codes, scales) * self.factor

    def multiply(self, x, weight):
        if self.fails:
            raise RuntimeError("no kernel image")
        return (x.float() @ weight.T).bfloat16()


@pytest.fixture
def timed(monkeypatch):
    """Without a clock: of which graph each time was taken, and of how many calls."""
    counts = []

    class Replays:
        def __init__(self, calls):
            self.number, self.count = len(graphs), len(calls)
            self.times = itertools.cycle((70.0, 10.0 * (self.number + 1), 1.0))
            self.warm = False
            graphs.append(self)
            for call in calls:
                call()

        def warm_up(self):
            self.warm = True

        def once(self):
            assert all(graph.warm for graph in graphs)
            counts.append((self.number, self.count))
            return next(self.times)

    graphs = []
    monkeypatch.setattr(linear, "Replays", Replays)
    return counts


def test_rows_of_peers_that_are_right_wrong_and_broken(timed, capsys):
    torch.manual_seed(0)
    every = linear.weights(64, 128, "cpu")
    peers = {"marlin": FakePeer(), "triton_kernels": FakePeer(1.01), "humming": FakePeer(fails=True)}
    rows = linear.measure(4, every, peers, ("bf16", *peers), "cpu")
    assert [row["who"] for row in rows] == ["bf16", "marlin", "triton_kernels", "humming"]
    assert {(row["weight"], row["tokens"]) for row in rows} == {("64x128", 4)}
    right, wrong, broken = rows[1:]
    assert rows[0]["us"] == 10.0
    assert right["us"] == 20.0
    assert 0 < right["error"] < linear.MOST_ERROR
    assert "us" not in wrong
    assert wrong["error"] == pytest.approx(0.01, rel=0.2)
    assert broken["failed"] == "RuntimeError: no kernel image"
    assert timed == [(0, len(every)), (1, len(every))] * linear.REPLAYS
    assert peers["marlin"].prepared == len(every)
    assert peers["triton_kernels"].prepared == 1
    said = capsys.readouterr().out.splitlines()
    assert [words.split()[2] for words in said] == [row["who"] for row in rows]
    assert "wrong" in said[2]
    assert "failed: RuntimeError" in said[3]
    assert _command.status(rows) == 1
    assert _command.status(rows[:2]) == 0


def test_a_product_of_another_shape_is_a_failure(timed):
    class Transposed(FakePeer):
        def multiply(self, x, weight):
            return super().multiply(x, weight).T

    (row,) = linear.measure(4, linear.weights(64, 128, "cpu"), {"marlin": Transposed()}, ["marlin"], "cpu")
    assert row["failed"] == "ValueError: got (64, 4), expected (4, 64)"
    assert timed == []


def row(who, us, tokens=1, weight="64x128"):
    return {"weight": weight, "tokens": tokens, "who": who, **({"failed": "x"} if us is None else {"us": us})}


def test_the_table_compares_with_the_fastest_peer():
    rows = [
        *(row("bf16", 5.0), row("a16w4", 12.0), row("marlin", 16.0), row("humming", 15.0)),
        *(row("a16w4", 30.0, 64), row("marlin", 20.0, 64), row("humming", None, 64)),
        *(row("a16w4", 7.0, weight="32x64"), row("w4a4", 8.0, weight="32x64")),
        row("marlin", 9.0, 8, weight="32x64"),
    ]
    entries = linear.together(rows)
    compared = [(e["weight"], e["tokens"], e["best_peer"], e["of_best_peer"]) for e in entries]
    assert compared == [
        ("64x128", 1, "humming", pytest.approx(0.8)),
        ("64x128", 64, "marlin", pytest.approx(1.5)),
        ("32x64", 1, None, None),
        ("32x64", 8, "marlin", None),
    ]
    lines = linear.table(entries)
    heading = "weight tokens bf16 a16w4 w4a4 marlin humming best peer a16w4 / best"
    assert lines[0].split() == heading.split()
    assert [line.split() for line in lines[1:]] == [
        ["64x128", "1", "5.00", "12.00", "-", "16.00", "15.00", "humming", "0.80"],
        ["64x128", "64", "-", "30.00", "-", "20.00", "-", "marlin", "1.50"],
        ["32x64", "1", "-", "7.00", "8.00", "-", "-", "-", "-"],
        ["32x64", "8", "-", "-", "-", "9.00", "-", "marlin", "-"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_json_holds_rows_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rows = [row("a16w4", 12.0)]
    _command.save(tmp_path / "rows.json", rows, together=linear.together(rows))
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["environment"] == {"device": "a GPU", "torch": torch.__version__}
    assert found["rows"] == rows
    assert found["together"][0]["us"] == {"a16w4": 12.0}
    _command.save(None, rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--who", "humming"], "--who humming needs --humming-path"),
        (["--who", "cutlass"], "invalid choice: 'cutlass'"),
        (["--humming-path", "{empty}"], "--humming-path: got {empty}, which is not, or does not hold, humming"),
        (["--vllm-library", "{empty}"], "--vllm-library: got {empty}, which is not, or does not hold, marlin"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: pathlib.Path, capsys, options, said):
    with pytest.raises(SystemExit):
        linear.main([option.format(empty=tmp_path) for option in options])
    assert said.format(empty=tmp_path) in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert linear.main(["--tokens", "1"]) == 2
    assert "linear: got no GPU" in capsys.readouterr().err
