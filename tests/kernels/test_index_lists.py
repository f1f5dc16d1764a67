"""Index lists say exactly which blocks are active, and change in place."""

import pytest
import torch

from ctrlcompile.kernels import index_lists


def random_mask(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns) < torch.rand(())


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (7, 1), (5, 8), (40, 33)])
def test_lists_hold_each_row_and_each_column_in_order(grid):
    mask = random_mask(*grid)
    lists = index_lists.build(mask)
    for r in range(grid[0]):
        listed = lists.col_indices[lists.crow_indices[r] : lists.crow_indices[r + 1]]
        assert listed.tolist() == mask[r].nonzero().flatten().tolist()
    for c in range(grid[1]):
        listed = lists.row_indices[lists.ccol_indices[c] : lists.ccol_indices[c + 1]]
        assert listed.tolist() == mask[:, c].nonzero().flatten().tolist()


def test_orders_name_the_longest_lists_first():
    mask = random_mask(23, 9)
    lists = index_lists.build(mask)
    for order, lengths in ((lists.row_order, mask.sum(1)), (lists.column_order, mask.sum(0))):
        assert sorted(order.tolist()) == list(range(len(lengths)))
        assert lengths[order].tolist() == sorted(lengths.tolist(), reverse=True)


@pytest.mark.parametrize("fill", [False, True])
def test_all_masked_and_all_active(fill):
    lists = index_lists.build(torch.full((3, 4), fill))
    assert lists.crow_indices.tolist() == [4 * fill * r for r in range(4)]
    assert lists.ccol_indices.tolist() == [3 * fill * c for c in range(5)]


def test_writing_keeps_the_tensors_and_leaves_nothing_of_the_old_mask():
    lists = index_lists.build(torch.ones(6, 5, dtype=torch.bool))
    addresses = [entry.data_ptr() for entry in lists]
    mask = random_mask(6, 5)
    index_lists.write_(lists, mask)
    assert [entry.data_ptr() for entry in lists] == addresses
    for written, fresh in zip(lists, index_lists.build(mask), strict=True):
        assert torch.equal(written, fresh)
        assert written.dtype == torch.int32
    assert not lists.col_indices[mask.sum() :].any()


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(12, dtype=torch.bool)])
def test_what_is_no_boolean_matrix_is_refused(mask):
    with pytest.raises(ValueError, match="boolean tensor of shape"):
        index_lists.build(mask)


def test_a_mask_of_another_grid_is_refused():
    lists = index_lists.build(random_mask(3, 4))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(3, 4\)"):
        index_lists.write_(lists, random_mask(4, 3))


def test_expand_repeats_each_block_and_ends_where_the_weight_ends():
    mask = random_mask(3, 4)
    entries = index_lists.expand(mask, (8, 16), (20, 50))
    assert index_lists.grid_shape((20, 50), (8, 16)) == (3, 4)
    assert entries.shape == (20, 50)
    for _ in range(50):
        i, j = int(torch.randint(20, ())), int(torch.randint(50, ()))
        assert entries[i, j] == mask[i // 8, j // 16]
