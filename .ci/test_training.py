"""The training and the data."""

import math
import re
import sys
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from helpers import make_model, write_mnist
from PIL import Image
from PIL.Image import Resampling, Transform
from torch.optim.lr_scheduler import OneCycleLR
from torch.testing import assert_close

import vit


def make_batches(n_batches=3, size=6):
    """Return batches of random images and labels, the same in each test."""
    torch.manual_seed(1)
    images = torch.rand(n_batches, size, 1, 28, 28)
    labels = torch.randint(10, (n_batches, size))
    return list(zip(images, labels, strict=True))


def test_train_matches_a_plain_loop():
    # Catches another optimizer, schedule, loss, order, transform, or lasting eval mode.
    model, reference = make_model(dropout=0.5), make_model(dropout=0.5)
    batches = make_batches()
    options = {"weight_decay": 1.0, "test_loader": batches, "transform": torch.neg}
    torch.manual_seed(0)
    losses = vit.train(model, batches, epochs=2, lr=0.01, **options)
    assert {type(loss) for loss in losses} == {float}  # a tensor would keep its graph

    torch.manual_seed(0)  # both drop the same numbers
    optimizer = torch.optim.AdamW(reference.parameters(), 0.01, weight_decay=1.0)
    scheduler = OneCycleLR(optimizer, 0.01, total_steps=6, cycle_momentum=False)
    for loss, (images, labels) in zip(losses, batches * 2, strict=True):
        expected = torch.nn.functional.cross_entropy(reference(-images), labels)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        scheduler.step()


def test_printed_line_has_loss_accuracy_and_time(capsys, monkeypatch):
    # Catches figures of other steps, batches, or times. Here, a batch takes a second.
    model = make_model()
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(output))
    clock = SimpleNamespace(perf_counter=lambda: len(calls))
    monkeypatch.setattr(vit, "time", clock)
    test_batches = make_batches(1, size=5)
    losses = vit.train(model, make_batches(), 2, 0.01, test_loader=test_batches)

    out = capsys.readouterr().out
    printed = [float(text) for text in re.findall(r"loss (\S+),", out)]
    assert printed == pytest.approx([fmean(losses[:3]), fmean(losses[3:])], abs=1e-4)
    accuracy = vit.evaluate(model, test_batches)
    assert out.endswith(f"test accuracy {accuracy:.2%}, 4.0 s\n")
    assert "\r" not in out  # progress is for terminals


@pytest.mark.parametrize("logit, pixel", [(0, math.nan), (-math.inf, 0)])
def test_loss_that_is_not_finite_ends_the_training(logit, pixel):
    # Catches an error that comes late, destroys the model, or blames the rate alone.
    model = make_model()
    model.head.bias.data[0] = logit
    images = torch.rand(2, 6, 1, 28, 28)
    images[1, 0, 0, 0, 0] = pixel
    batches = [(batch, torch.zeros(6).long()) for batch in images]
    with pytest.raises(FloatingPointError, match="(nan|inf) in epoch 1: lower .* NaN"):
        vit.train(model, batches, epochs=1, lr=0.01)
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("stream", [None, SimpleNamespace(write=len, flush=int)])
def test_output_that_is_not_a_stream(stream, monkeypatch):
    # Catches a question to sys.stdout that not every object can answer.
    monkeypatch.setattr(sys, "stdout", stream)
    assert len(vit.train(make_model(), make_batches(), epochs=1, lr=0.01)) == 3


def test_loader_with_fewer_batches_than_its_length():
    # Catches losses of steps that were never taken, and a model left in training mode.
    model = make_model()
    loader = type("ShortLoader", (list,), {"__len__": lambda self: 3})(make_batches(2))
    assert len(vit.train(model, loader, epochs=2, lr=0.01)) == 4
    assert not model.training


def test_evaluate_counts_images_not_batches():
    # Catches the mean over batches, and labels (B, 1) compared with all predictions.
    model = make_model().eval()
    images = torch.rand(7, 1, 28, 28)
    labels = model(images).argmax(dim=1)
    labels[:2] += 1
    for target in (labels, labels.unsqueeze(1)):
        batches = [(images[:6], target[:6]), (images[6:], target[6:])]
        assert vit.evaluate(model, batches) == pytest.approx(5 / 7)


def test_evaluate_refuses_what_it_cannot_compare():
    # Catches a figure for labels of another size or for none, and a missing no_grad.
    model = make_model()
    seen = []
    model.head.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    with pytest.raises(RuntimeError, match=r"\[6\].* size 60"):
        vit.evaluate(model, [(torch.rand(6, 1, 28, 28), torch.eye(10)[:6])])
    with pytest.raises(ValueError, match="at least one data point"):
        vit.evaluate(model, [])
    assert seen == [False]


def test_load_mnist_reads_the_files(tmp_path):
    # Catches values up to 255, another order, swapped sets, and unaugmented digits.
    write_mnist(raw := tmp_path / "MNIST/raw")
    train_set, test_set = vit.load_mnist(tmp_path)
    assert len(test_set) == 60
    images, labels = train_set.tensors
    assert len(images.unique(dim=0)) == 240

    # The files again, by hand: the data starts after 16 and 8 bytes.
    pixels = (raw / "train-images-idx3-ubyte").read_bytes()[16:]
    assert_close(images, torch.tensor(list(pixels)).view(240, 1, 28, 28) / 255)
    assert bytes(labels.tolist()) == (raw / "train-labels-idx1-ubyte").read_bytes()[8:]


def test_augment_matches_pillow():
    # Catches swapped axes, another direction, range, or border, and one draw for all.
    images = torch.rand(20, 1, 5, 5)
    images = torch.nn.functional.interpolate(images, 40, mode="bicubic")
    torch.manual_seed(0)
    augmented = vit.augment(images)
    torch.manual_seed(0)
    matrices = torch.eye(2, 3) + torch.empty(20, 2, 3).uniform_(-0.15, 0.15)

    for image, result, matrix in zip(images, augmented, matrices, strict=True):
        # Pillow counts positions in pixels, from 0 to 40, not from -1 to 1.
        matrix[:, 2] = 20 * (matrix[:, 2] + 1 - matrix[:, :2].sum(dim=1))
        options = [Transform.AFFINE, matrix.flatten().tolist(), Resampling.BILINEAR]
        expected = Image.fromarray(image[0].numpy()).transform((40, 40), *options)
        expected = torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.float32)
        # Pillow does not blend the border with black.
        assert (result.flatten() - expected).abs().quantile(0.8) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_augment_takes_any_float_images(dtype):
    # Catches positions in half precision: pixels off by whole places, even crashes.
    images = torch.rand(2, 3, 224, 224).to(dtype)
    torch.manual_seed(0)
    augmented = vit.augment(images)
    torch.manual_seed(0)
    assert_close(augmented, vit.augment(images.float()))
