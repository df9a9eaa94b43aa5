"""What tasks are made of: a split, prepared images, draws that can be had again."""

import pytest
import torch
from dataset_cases import same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from convnn_geo.datasets import load
from convnn_geo.datasets.images import ImageDataset, channel_statistics
from convnn_geo.datasets.repeatable import Repeatable
from convnn_geo.datasets.splits import hold_out


@given(count=st.integers(2, 300), seed=st.integers(0, 9))
def test_hold_out_is_a_split(count, seed):
    train, validation = hold_out(count, seed)
    assert torch.cat([train, validation]).sort().values.tolist() == list(range(count))
    assert len(validation) == max(1, count // 10)


def test_hold_out_depends_on_the_seed():
    assert not torch.equal(hold_out(100, 0)[1], hold_out(100, 1)[1])


def test_channel_statistics_of_bytes_and_floats():
    images = torch.randint(256, (2500, 3, 4, 5), dtype=torch.uint8)
    images[:, 2] = 51
    for given_images in (images, images.double() / 255):
        mean, std = channel_statistics(given_images)
        rows = images.double().transpose(0, 1).flatten(1) / 255
        torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(std[:2].double(), rows[:2].std(1, correction=0))
        assert std[2] == 1  # a constant channel can't be scaled


def test_batches_of_images_are_single_images():
    images = torch.randint(256, (6, 3, 9, 7), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    dataset = ImageDataset(images, torch.arange(6), 5, mean, std, transform=lambda x: x.flip(-1))
    for (x, y), number in zip(dataset.__getitems__([4, 1]), (4, 1), strict=True):
        assert y == number
        torch.testing.assert_close(x, dataset[number][0])
    alone = ImageDataset(images, None)
    assert torch.equal(alone[2], images[2].float() / 255)
    assert len(alone) == 6 and len(alone.__getitems__([0, 1])) == 2


def test_image_dataset_refuses_labels_of_another_number():
    with pytest.raises(ValueError, match=r"target: expected shape \(6,\)"):
        ImageDataset(torch.zeros(6, 1, 2, 2), torch.zeros(5))


class Draws(Dataset):
    """Its examples are random numbers."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return torch.rand(3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 2**40),
    order=st.permutations(range(8)),
    before=st.integers(0, 99),
)
def test_repeatable_depends_on_seed_epoch_and_number_alone(seed, epoch, order, before):
    dataset, again = Repeatable(Draws(), seed), Repeatable(Draws(), seed)
    dataset.set_epoch(epoch)
    again.set_epoch(epoch)
    expected = {number: dataset[number] for number in range(8)}
    torch.manual_seed(before)
    state = torch.get_rng_state()
    found = {number: again[number] for number in order}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[number], expected[number]) for number in range(8))
    again.set_epoch(epoch + 1)
    values = [*expected.values(), *(again[number] for number in range(8))]
    values.append(Repeatable(Draws(), seed + 1)[0])
    assert len({tuple(value.tolist()) for value in values}) == 17


def test_workers_that_live_on_see_the_epoch():
    dataset = Repeatable(Draws(), 0)
    loader = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        found = torch.cat(list(loader))
        assert torch.equal(found, torch.stack([dataset[number] for number in range(8)]))


def test_set_epoch_of_a_task_draws_training_examples_anew():
    task = load("denoising", count=10)
    before = {part: getattr(task, part)[0] for part in ("train", "validation", "test")}
    task.set_epoch(1)
    assert not torch.equal(task.train[0][0], before["train"][0])
    assert torch.equal(task.train[0][1], before["train"][1])
    assert same(task.validation[0], before["validation"])
    assert same(task.test[0], before["test"])
    task.set_epoch(0)
    assert same(task.train[0], before["train"])
    plain = load("digits")
    plain.set_epoch(3)
    assert same(plain.train[0], load("digits").train[0])
