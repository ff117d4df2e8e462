"""Tests of vit.py. They need neither MNIST nor internet access."""

import re

import pytest
import torch
import torchvision
from torch.testing import assert_close

import vit

# One batch: images (32, 1, 28, 28) and labels (32).
IMAGES, LABELS = vit.make_synthetic_digits(32).tensors
BATCH = IMAGES, LABELS


def make_model(**changes):
    """Return the model that `python vit.py` trains, or one of other sizes."""
    sizes = {
        "img_size": 28,
        "patch_size": 7,
        "in_channels": 1,
        "num_classes": 10,
        "embed_dim": 64,
        "depth": 4,
        "n_heads": 4,
        "mlp_ratio": 2.0,
    }
    return vit.VisionTransformer(**sizes | changes)


def test_shapes():
    # Catches a missing class token, swapped axes, and softmax over the wrong axis.
    model = make_model()
    assert model(IMAGES).shape == (32, 10)
    assert model.forward_features(IMAGES).shape == (32, 17, 64)
    assert make_model(num_classes=0)(IMAGES).shape == (32, 64)

    # For each image, block, head and query token, the weights of all keys sum to 1.
    sums = model.attention_maps(IMAGES).sum(dim=4)
    assert_close(sums, torch.ones(32, 4, 4, 17))


def test_parameter_counts():
    # Catches an extra or a missing layer or bias. The last model is ViT-B/16, with the
    # number of torchvision's. "meta" means shapes without data.
    with torch.device("meta"):
        models = make_model(), make_model(qkv_bias=False), vit.VisionTransformer()
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [139_018, 138_250, 86_567_656]


def test_logits_match_torchvision():
    # Catches mistakes in the computation: scale, heads, norms, residuals, GELU, order.
    # torchvision's model takes color images. In float64, rounding hides no mistake. In
    # eval mode, dropout changes nothing.
    model = make_model(in_channels=3, mlp_ratio=1.5, dropout=0.5).double().eval()
    reference = torchvision.models.VisionTransformer(
        image_size=28,
        patch_size=7,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=96,
        num_classes=10,
    )
    reference.double().eval()

    # If a parameter were 0 or 1, a mistake in its use could go undetected.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    # Copy the weights. Both models list them in the same order, but for the position
    # embedding: second here, fourth there.
    weights = list(model.state_dict().values())
    pos_embed = weights.pop(1)
    weights.insert(3, pos_embed)
    reference.load_state_dict(dict(zip(reference.state_dict(), weights)))

    images = torch.rand(5, 3, 28, 28).double()
    assert_close(model(images), reference(images))


def test_errors_name_what_is_wrong():
    # Catches a missing check, or a message that does not say what was given.
    with pytest.raises(ValueError, match="patch_size .* 5 and 28"):
        make_model(patch_size=5)
    with pytest.raises(ValueError, match="n_heads .* 5 and 64"):
        make_model(n_heads=5)
    with pytest.raises(ValueError, match=r"1, 28, 28\), got \(32, 1, 29, 29\)"):
        make_model()(torch.rand(32, 1, 29, 29))

    # After one step with such a weight decay, the weights are too large for any number.
    with pytest.raises(FloatingPointError, match="epoch 2"):
        vit.train(make_model(), [BATCH], weight_decay=1e30)


def test_dropout_is_on_in_every_epoch():
    # Catches a model.train() that is called only once, before the loop over the epochs:
    # evaluate would turn dropout off for good. If it is on, dropout=1 sets all tokens
    # to 0. In the last step, only the last norm's bias and the head have a gradient.
    model = make_model(dropout=1.0)
    vit.train(model, [BATCH], test_loader=[BATCH], epochs=2)
    learning = [name for name, p in model.named_parameters() if p.grad.any()]
    assert learning == ["norm.bias", "head.weight", "head.bias"]


def test_train_overfits_one_batch(capsys):
    # Catches training that does not learn, a parameter that gets no gradient, a wrong
    # mode at the end, and a wrong loss or accuracy. torch.neg stands for augment: the
    # model is trained on the negatives of the images, and tested on them.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model().to(device)
    losses = vit.train(model, [BATCH] * 2, epochs=40, lr=5e-3, augment=torch.neg)
    assert losses[-1] < 0.03
    assert not model.training
    for parameter in model.parameters():
        assert parameter.grad.any()

    # The second loss printed is the mean of the two steps of epoch 2.
    assert f"loss {sum(losses[2:4]) / 2:.4f}" in capsys.readouterr().out

    # The model now gets all 32 right. 8 more have a wrong label: 32 of 40 are right.
    # evaluate sets eval mode by itself.
    right = -IMAGES, LABELS
    wrong = -IMAGES[:8], LABELS[:8] + 1
    model.train()
    assert vit.evaluate(model, [right, wrong]) == pytest.approx(32 / 40)
    assert not model.training


def test_main_runs_without_internet(monkeypatch, tmp_path, capsys):
    # Catches an unused seed, a checkpoint that does not load or is not the trained
    # model, and whatever stops the program where MNIST cannot be downloaded.
    command = "vit.py --embed-dim 16 --depth 1 --epochs 1 --device cpu"
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setattr(vit.MNIST, "mirrors", ["file:///nowhere/"])
    monkeypatch.chdir(tmp_path)

    # Each run prints a loss and an accuracy for its epoch, and an accuracy at the end.
    results = []
    for _ in range(2):
        vit.main()
        results.append(re.findall(r"loss \S+|\S+%", capsys.readouterr().out))
    assert results[0] == results[1]

    # Both accuracies are those of the checkpoint on main's test set. To get the same
    # random digits, use main's seed and draw random weights first, as main does.
    checkpoint = torch.load("out/synthetic.pt")
    torch.manual_seed(0)
    model = vit.VisionTransformer(**checkpoint["sizes"])
    _, _, test_set = vit.load_digits("data")

    model.load_state_dict(checkpoint["weights"])
    accuracy = vit.evaluate(model, [test_set.tensors])
    assert results[0][1:] == [f"{accuracy:.2%}"] * 2
