"""Memory on large pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from hasten.model.native.linear import PanelLinear
from hasten.model.pages import LINE, PAGE, PIECE, on_large_pages, placed, room


def test_tensors_have_places_of_their_own_one_behind_the_other() -> None:
    first, second = room((3, 5), torch.float32), room((7,), torch.bfloat16)
    first.fill_(1)
    second.fill_(2)
    assert first.shape == (3, 5) and first.dtype == torch.float32 and (first == 1).all()
    assert second.shape == (7,) and second.dtype == torch.bfloat16 and (second == 2).all()
    assert first.data_ptr() % LINE == second.data_ptr() % LINE == 0
    if first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr():
        assert second.data_ptr() - first.data_ptr() == LINE


def test_one_larger_than_a_piece_begins_on_a_large_page() -> None:
    large = room((PIECE + 1,), torch.uint8)
    assert len(large) == PIECE + 1 and large.data_ptr() % PAGE == 0


def test_a_copy_is_the_tensor() -> None:
    tensor = torch.randn(4, 6).transpose(0, 1)
    assert torch.equal(placed(tensor), tensor) and placed(tensor).is_contiguous()


def test_weights_of_a_layer_are_there() -> None:
    weight = torch.randn(40, 24)
    assert torch.equal(PanelLinear(weight, None, "float32").dequant(), weight)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which memory it was told to put on large pages")
def test_the_system_is_asked_for_large_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("a kernel without large pages")
    whole = on_large_pages(torch.empty(4 * PAGE, dtype=torch.uint8))
    middle = whole.data_ptr() + 2 * PAGE
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, stop = (int(end, 16) for end in mapping.split(" ", 1)[0].split("-"))
        if start <= middle < stop:
            flags = re.search(r"VmFlags:(.*)", mapping)
            assert flags is not None and "hg" in flags[1].split()
            return
    pytest.fail("memory of no mapping")
