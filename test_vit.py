"""Tests of vit.py. They need neither MNIST nor internet access."""

import pytest
import torch
import torchvision
from torch.testing import assert_close

import vit

# One batch: images (32, 1, 28, 28) and labels (32).
BATCH = IMAGES, LABELS = vit.make_synthetic_digits(32).tensors


def make_model(**changes):
    """Return the model that `python vit.py` trains, with optional overrides."""
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


@pytest.fixture
def pair():
    """Return the model and torchvision's, with equal weights, for color images."""
    model = make_model(in_channels=3, mlp_ratio=1.5, dropout=0.5)
    reference = torchvision.models.VisionTransformer(
        image_size=28,
        patch_size=7,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=96,
        dropout=0.5,
        num_classes=10,
    )

    # If a parameter were 0 or 1, a mistake in its use could go undetected.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    # Copy the weights. Both models list them in the same order, except for the position
    # embedding: second here, fourth there.
    weights = list(model.state_dict().values())
    weights.insert(3, weights.pop(1))
    reference.load_state_dict(dict(zip(reference.state_dict(), weights, strict=True)))

    # In float64, rounding cannot hide an error. In eval mode, dropout is off.
    return model.double().eval(), reference.double().eval()


def test_shapes():
    # Catches a missing class token, and a head where none is wanted.
    assert make_model()(IMAGES).shape == (32, 10)
    assert make_model().forward_features(IMAGES).shape == (32, 17, 64)
    assert make_model(num_classes=0)(IMAGES).shape == (32, 64)


def test_logits_match_torchvision(pair):
    # Catches mistakes in the computation: scale, heads, norms, residuals, GELU, order.
    model, reference = pair
    images = torch.rand(5, 3, 28, 28).double()
    assert_close(model(images), reference(images))


def test_attention_maps_match_torchvision(pair):
    # Catches attention_weights that differ from what forward uses, and maps of another
    # block.
    model, reference = pair
    images = torch.rand(5, 3, 28, 28).double()
    maps = model.attention_maps(images)

    x = model.embed(images)
    for i, layer in enumerate(reference.encoder.layers):
        normed = layer.ln_1(x)
        _, weights = layer.self_attention(
            normed, normed, normed, average_attn_weights=False
        )
        assert_close(maps[:, i], weights)
        x = layer(x)


def test_errors_name_what_is_wrong():
    # Catches a missing check, or a message that does not say what was given.
    with pytest.raises(ValueError, match="patch_size .* 5 and 28"):
        make_model(patch_size=5)
    with pytest.raises(ValueError, match="n_heads .* 5 and 64"):
        make_model(n_heads=5)
    with pytest.raises(ValueError, match=r"is 28, .* \(32, 1, 28, 27\)"):
        make_model()(IMAGES[..., 1:])

    # After one step with such a weight decay, the logits overflow.
    with pytest.raises(FloatingPointError, match="nan in epoch 2"):
        vit.train(make_model(), [BATCH], epochs=2, lr=1, weight_decay=1e30)


def test_train_matches_a_plain_loop(pair):
    # Catches another optimizer, schedule, loss, step order or dropout, and dropout that
    # is off after an evaluation. torch.neg is a stand-in for augment.
    model, reference = pair
    batch = image, label = torch.rand(1, 3, 28, 28).double(), LABELS[:1]
    torch.manual_seed(0)
    options = {"weight_decay": 1.0, "test_loader": [batch], "transform": torch.neg}
    losses = vit.train(model, [batch] * 2, epochs=2, lr=0.01, **options)

    # With the same seed, and one image at a time, both models drop the same numbers.
    torch.manual_seed(0)
    reference.train()
    optimizer = torch.optim.AdamW(reference.parameters(), 0.01, weight_decay=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, total_steps=len(losses), cycle_momentum=False
    )
    for loss in losses:
        expected = torch.nn.functional.cross_entropy(reference(-image), label)
        assert loss == pytest.approx(expected.item())
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        scheduler.step()


def test_train_overfits_one_batch():
    # Catches training that does not learn, and a wrong accuracy, also of labels (B, 1).
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model().to(device)
    losses = vit.train(model, [BATCH], epochs=80, lr=5e-3)
    assert losses[-1] < 0.03
    assert not model.training

    # The model now gets all 32 right. 8 more have a wrong label: 32 of 40 are right.
    # evaluate sets eval mode by itself.
    model.train()
    wrong = IMAGES[:8], LABELS[:8, None] + 1
    assert vit.evaluate(model, [BATCH, wrong]) == pytest.approx(32 / 40)
    assert not model.training


def test_main_runs_without_internet(monkeypatch, tmp_path):
    # Catches a crash when MNIST is unavailable, and a checkpoint that does not load or
    # has not been trained.
    command = "vit.py --depth 1 --epochs 1 --batch-size 64 --device cpu"
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.setattr(vit.MNIST, "mirrors", ["file:///nowhere/"])
    monkeypatch.chdir(tmp_path)
    vit.main()

    checkpoint = torch.load("out/synthetic.pt")
    model = vit.VisionTransformer(**checkpoint["sizes"])
    model.load_state_dict(checkpoint["weights"])
    assert vit.evaluate(model, [BATCH]) > 0.5
