"""``benchmarks.joined_chain`` without a GPU: all ways give the same bytes, and what does not is not timed."""

import pytest
import torch

from benchmarks import _command, joined_chain


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return joined_chain.Chain(joined_chain.TINY, 2, "cpu")


@torch.no_grad()
def test_all_ways_give_the_same_numbers(chain):
    x, residual = state = chain.inputs(3)
    y, after = chain.joined(x, residual)
    assert y.shape == after.shape == (3, joined_chain.TINY["hidden"])
    assert y.isfinite().all()
    assert y.abs().max() > 0
    assert not torch.equal(after, residual)
    assert joined_chain.differing(chain, state) == 0


def test_rows_of_all_ways(chain, monkeypatch):
    monkeypatch.setattr(joined_chain, "times", lambda step, state, groups, layers: [float(i) for i in range(groups)])
    rows = joined_chain.measure(chain, 3, 9)
    assert [(row["side"], row["first"], row["us"], row["last"]) for row in rows] == [
        (side, 1.0, 4.0, 7.0) for side in ("joined", "pairs", "apart")
    ]
    assert _command.status(rows) == 0
    assert joined_chain.line(rows[0]).split() == ["3", "joined", "1.00", "4.00", "7.00"]


@pytest.mark.parametrize("side", joined_chain.SIDES)
def test_other_bytes_are_not_timed(chain, monkeypatch, side):
    monkeypatch.setattr(chain, side, lambda x, residual: (x, residual))
    rows = joined_chain.measure(chain, 3, 9)
    assert all("us" not in row for row in rows)
    assert _command.status(rows) == 1
    assert "numbers differ" in joined_chain.line(rows[1])


def test_arguments(capsys):
    with pytest.raises(SystemExit):
        joined_chain.main(["--groups", "0"])
    assert "allowed 1 and more" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert joined_chain.main([]) == 2
