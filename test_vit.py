"""Tests of vit.py. They need neither MNIST nor internet access."""

import re

import pytest
import torch
import torchvision
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import vit

# The model that `python vit.py` trains.
SIZES = {
    "img_size": 28,
    "patch_size": 7,
    "in_channels": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 4,
    "n_heads": 4,
    "mlp_ratio": 2.0,
}


def test_shapes():
    # Catches a missing class token, swapped axes, and softmax over the wrong axis.
    model = vit.VisionTransformer(**SIZES)
    images = torch.rand(5, 1, 28, 28)
    assert model(images).shape == (5, 10)
    assert model.forward_features(images).shape == (5, 17, 64)

    maps = model.attention_maps(images)
    assert maps.shape == (5, 4, 4, 17, 17)
    assert_close(maps.sum(dim=4), torch.ones(5, 4, 4, 17))


def test_parameter_counts():
    # Catches an extra or a missing layer or bias. "meta" means shapes without data.
    with torch.device("meta"):
        small = vit.VisionTransformer(**SIZES)
        vit_b_16 = vit.VisionTransformer()
    assert sum(p.numel() for p in small.parameters()) == 139_018
    assert sum(p.numel() for p in vit_b_16.parameters()) == 86_567_656


def test_logits_match_torchvision():
    # Catches mistakes in the computation: scale, heads, norms, residuals, GELU, order.
    model = vit.VisionTransformer(**SIZES | {"in_channels": 3}).double().eval()
    reference = torchvision.models.VisionTransformer(
        image_size=28,
        patch_size=7,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=10,
    )
    reference.double().eval()

    # If a parameter were 0 or 1, a mistake in its use could go undetected.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    # Copy the weights in order. The position embedding, second here, is fourth there.
    weights = list(model.state_dict().values())
    weights.insert(3, weights.pop(1))
    reference.load_state_dict(dict(zip(reference.state_dict(), weights)))

    images = torch.rand(5, 3, 28, 28).double()
    assert_close(model(images), reference(images))


def test_wrong_sizes_are_rejected():
    # Catches a missing check. The message has to name what was given.
    with pytest.raises(ValueError, match="patch_size .* 5 and 28"):
        vit.VisionTransformer(**SIZES | {"patch_size": 5})
    with pytest.raises(ValueError, match="n_heads .* 5 and 64"):
        vit.VisionTransformer(**SIZES | {"n_heads": 5})

    model = vit.VisionTransformer(**SIZES)
    with pytest.raises(ValueError, match=r"1, 28, 28\), got \(5, 3, 28, 28\)"):
        model(torch.rand(5, 3, 28, 28))


def test_every_parameter_gets_a_gradient():
    # Catches a parameter that is never used, and a detach in the wrong place.
    model = vit.VisionTransformer(**SIZES)
    logits = model(torch.rand(5, 1, 28, 28))
    cross_entropy(logits, torch.arange(5)).backward()
    for parameter in model.parameters():
        assert parameter.grad.any()


def test_dropout_is_on_in_every_epoch():
    # Catches model.train() before the loop: evaluate would turn dropout off for good.
    model = vit.VisionTransformer(**SIZES, dropout=0.5)
    modes = []
    model.dropout.register_forward_hook(
        lambda module, inputs, output: modes.append(module.training)
    )
    batches = [vit.make_synthetic_digits(5).tensors]
    vit.train(model, batches, test_loader=batches, epochs=2)
    assert modes == [True, False, True, False]


def test_train_overfits_one_batch():
    # Catches training that does not learn (no gradient, no update, no rising rate), and
    # one that leaves dropout on.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = vit.VisionTransformer(**SIZES).to(device)
    batches = [vit.make_synthetic_digits(64).tensors]
    losses = vit.train(model, batches, epochs=80, lr=3e-3)
    assert len(losses) == 80 and losses[-1] < 0.1
    assert not model.training
    assert vit.evaluate(model, batches) == 1


def test_main_runs_without_internet(monkeypatch, tmp_path, capsys):
    # Catches an unused seed, a checkpoint that does not load or is not the trained
    # model, and whatever stops the program where MNIST cannot be downloaded.
    command = "vit.py --embed-dim 16 --depth 1 --epochs 1 --device cpu"
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setattr(vit.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody there
    monkeypatch.chdir(tmp_path)
    results = []
    for _ in range(2):
        vit.main()
        results.append(re.findall(r"loss \S+|\S+%", capsys.readouterr().out))
    assert results[0] == results[1]

    # Draw random numbers in main's order, first weights, then digits: the same digits.
    checkpoint = torch.load("out/synthetic.pt")
    torch.manual_seed(0)
    model = vit.VisionTransformer(**checkpoint["sizes"])
    _, _, test_set = vit.load_digits("data")

    model.load_state_dict(checkpoint["weights"])
    accuracy = vit.evaluate(model, [test_set.tensors])
    assert f"{accuracy:.2%}" == results[0][-1]
