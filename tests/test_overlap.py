"""Batches made in a stream of their own: the same ones, in the same order, on whatever device."""

import pytest
import torch

from fmxnn.training import overlapped


def made(count, device, log):
    slow = torch.randn(1024, 1024, device=device)
    for number in range(count):
        log.append(number)
        yield torch.full((4, 2, 3), float(number), device=device) + 0 * (slow @ slow).sum()


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="has no GPU"))],
)
def test_batches_arrive_whole_in_order_and_when_they_are_asked_for(device):
    log = []
    for number, x in enumerate(overlapped(made(5, device, log), device)):
        assert bool((x == number).all())
        assert log == list(range(number + 1))
    assert number == 4
    assert list(overlapped([], device)) == []
    for number, (x, y) in enumerate(overlapped(((x, -x) for x in made(5, device, [])), device)):
        assert bool((x == number).all())
        assert bool((y == -number).all())
    assert number == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="has no GPU")
def test_what_a_store_reads_is_brought_to_the_gpu():
    for number, (x, y) in enumerate(overlapped(((x, -x) for x in made(5, "cpu", [])), "cuda")):
        assert x.is_cuda
        assert bool((x == number).all())
        assert bool((y == -number).all())
