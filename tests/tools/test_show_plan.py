"""The table of the tensor-parallel plan says what is not cut evenly."""

from __future__ import annotations

import pytest

from tools.show_plan import main


def test_short_shares_and_shared_heads_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "configs/quickstart.toml", "--parallel.tp=4", "--model.vocab_multiple_of=1"]
    main([*config, "--model.num_heads=8", "--model.num_kv_heads=2"])
    shown = capsys.readouterr().out
    assert "The last rank has 62 of the padded vocabulary's 257 rows, the others 65." in shown
    assert "query_key_value.weight: each of the 2 key-value heads lies on 2 ranks, which sum its gradient once a step; each has" in shown
    main(["--config", "configs/quickstart.toml"])
    shown = capsys.readouterr().out
    assert "key-value" not in shown and "parallel residual: once per block and direction" in shown
    main(["--config", "configs/quickstart.toml", "--model.parallel_residual=false"])
    assert "sequential residual: twice per block and direction" in capsys.readouterr().out
