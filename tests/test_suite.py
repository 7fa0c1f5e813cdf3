"""The suite itself."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.conftest import pytest_collection_modifyitems


@pytest.mark.parametrize("asked_for, refused", [("gpu", True), ("not slow and not gpu", False)])
def test_gpu_tests_alone_are_refused_in_a_sentence_where_there_is_no_gpu(asked_for: str, refused: bool) -> None:
    config = SimpleNamespace(option=SimpleNamespace(markexpr=asked_for))
    item = mock.Mock(**{"get_closest_marker.return_value": SimpleNamespace(args=(2,))})
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        if refused:
            with pytest.raises(pytest.UsageError, match=r"^-m gpu needs a GPU, and torch \S+ sees none here; .*\.$"):
                pytest_collection_modifyitems(config, [item])
        else:
            pytest_collection_modifyitems(config, [item])
            assert item.add_marker.call_args.args[0].kwargs["reason"] == "needs 2 GPU(s), and torch sees 0"
