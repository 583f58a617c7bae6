"""McNemar's exact test against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from dwf.report.paired import Paired, paired, worst_case_of


def test_by_hand():
    assert Paired(0, 0).p_value == 1.0
    assert Paired(5, 5).p_value == 1.0
    assert Paired(1, 0).p_value == 1.0
    # 2 (1 + 6) / 2^6
    assert Paired(1, 5).p_value == pytest.approx(14 / 64)
    assert Paired(10, 0).p_value == pytest.approx(2 / 1024)
    assert Paired(5, 1).p_value == Paired(1, 5).p_value


def test_many_images_do_not_overflow():
    assert Paired(400, 800).p_value < 1e-20
    assert 0.1 < Paired(600, 620).p_value < 1


def test_only_images_on_which_they_differ_count():
    first = torch.tensor([True, True, False, False, True])
    second = torch.tensor([True, False, True, False, False])
    assert paired(first, second) == Paired(2, 1)


def test_worst_case():
    rows = [torch.tensor([True, True, False]), torch.tensor([True, False, True])]
    assert worst_case_of(rows).tolist() == [True, False, False]
    assert rows[0].tolist() == [True, True, False]
    assert worst_case_of([*rows, None]) is None
    assert worst_case_of([]) is None
