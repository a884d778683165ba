"""Pictures that could not be read: counted by the pass, told at its end, too many are an error."""

import pytest
import torch

from segkern.data.collate import Batch
from segkern.structures.targets import Targets
from segkern.training.unread import Unread


def batch(images, *unread):
    masks = [torch.zeros(0, 4, 4, dtype=torch.uint8)] * images
    targets = Targets.from_lists(masks, [torch.zeros(0, dtype=torch.int64)] * images, (4, 4))
    return Batch(torch.zeros(images, 3, 4, 4), targets, list(unread))


def test_a_line_at_the_end_of_a_pass_that_lost_some():
    unread = Unread(10, 4)
    assert unread([batch(4)]) is None
    assert unread([batch(2, "a"), batch(2, "b")]) is None
    told = unread([batch(4, "a")])
    assert told == "3 of 12 pictures of the pass could not be read: a; b; ..."
    # the second pass began within that step
    assert unread([batch(4)]) is None
    assert unread([batch(4, "c")]) == "1 of 8 pictures of the pass could not be read: c"
    assert unread([batch(4)]) is None
    assert unread([batch(4)]) is None


def test_the_last_step_tells_what_it_knows():
    unread = Unread(100, 4)
    assert unread([batch(4)]) is None
    assert unread([batch(4, "a")], last=True) == (
        "1 of 8 pictures of the pass could not be read: a"
    )


def test_a_run_that_goes_on_ends_its_pass_where_the_first_would():
    unread = Unread(10, 4, start=2)
    assert unread([batch(4, "a")]) == "1 of 4 pictures of the pass could not be read: a"


def test_a_process_of_several_counts_its_own():
    unread = Unread(8, 4)
    assert unread([batch(2, "a")]) is None
    assert unread([batch(2)]) == "1 of 4 pictures of the pass could not be read: a"


def test_of_files_any_number_may_be_lost():
    """Another picture stands for each: that none is left is said where they are read."""
    told = Unread(2, 2)([batch(2, "a", "b")])
    assert told == "2 of 2 pictures of the pass could not be read: a; b"


def test_more_than_may_be_is_an_error():
    unread = Unread(6, 2, most=0.5)
    assert unread([batch(2, "a", "b")]) is None
    assert unread([batch(2)]) is None
    with pytest.raises(ValueError, match=r"4 of 6 pictures .*: a; b; c; \.\.\.: more than 50%"):
        unread([batch(2, "c", "d")])
