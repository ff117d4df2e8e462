"""Tests of vit.py. They need neither MNIST nor internet access."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torchvision.models import VisionTransformer

import vit

torch.manual_seed(0)

# One batch: images (32, 1, 28, 28) and labels (32).
BATCH = IMAGES, LABELS = vit.make_synthetic_digits(32).tensors

# The model that `python vit.py` trains, with optional changes.
make_model = partial(
    vit.VisionTransformer,
    img_size=28,
    patch_size=7,
    in_channels=1,
    num_classes=10,
    embed_dim=64,
    depth=4,
    n_heads=4,
    mlp_ratio=2.0,
)


@pytest.fixture
def pair():
    """Return our model and torchvision's, for color images, with equal weights."""
    model = make_model(in_channels=3, mlp_ratio=1.5, dropout=0.5)
    reference = VisionTransformer(
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
        parameter.data.normal_(std=0.2)

    # The order of parameters agrees, except for the position embedding: second in ours,
    # fourth in theirs.
    weights = list(model.state_dict().values())
    weights.insert(3, weights.pop(1))
    reference.load_state_dict(dict(zip(reference.state_dict(), weights)))

    # In float64, rounding cannot hide an error. In eval mode, dropout is off.
    return model.double().eval(), reference.double().eval()


def test_shapes():
    # Catches a missing class token and an unwanted last linear layer.
    model = make_model()
    assert model(IMAGES).shape == (32, 10)
    assert model.forward_features(IMAGES).shape == (32, 17, 64)
    assert model.attention_maps(IMAGES).shape == (32, 4, 4, 17, 17)
    assert make_model(num_classes=0)(IMAGES).shape == (32, 64)


def test_logits_and_maps_match_torchvision(pair):
    # Catches mistakes in the computation (scale, heads, norms, residuals, GELU, order),
    # and maps that differ from the weights that forward uses.
    model, reference = pair
    images = torch.rand(5, 3, 28, 28).double()
    assert_close(model(images), reference(images))

    x = model.embed(images)
    maps = model.attention_maps(images)
    for i, layer in enumerate(reference.encoder.layers):
        qkv = [layer.ln_1(x)] * 3
        _, weights = layer.self_attention(*qkv, average_attn_weights=False)
        assert_close(maps[:, i], weights)
        x = layer(x)


def test_dropout_matches_torchvision(pair):
    # Catches dropout that is missing, misplaced, or left on by evaluate.
    model, reference = pair
    image = torch.rand(1, 3, 28, 28).double()

    # With one image and one seed, both models drop the same activations.
    torch.manual_seed(0)
    logits = model.train()(image)
    torch.manual_seed(0)
    assert_close(logits, reference.train()(image))

    vit.evaluate(model, [(image, LABELS[:1])])
    assert not model.training


def test_what_others_rely_on():
    # Catches names other than timm's, code that torch.fx cannot trace, and accepting
    # images of a wrong size.
    model = make_model()
    for name in "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2":
        model.blocks[0].get_submodule(name)

    traced = torch.fx.symbolic_trace(model)
    assert_close(traced(IMAGES), model(IMAGES))
    with pytest.raises(AssertionError):
        traced(IMAGES[..., 1:])


def test_train_overfits_one_batch():
    # Catches training that does not learn, and a wrong accuracy.
    model = make_model()
    losses = vit.train(model, [BATCH], epochs=80, lr=5e-3)
    assert losses[-1] < 0.1

    # The model now gets all 32 right: with 8 wrong labels added, 32 of 40.
    wrong = IMAGES[:8], LABELS[:8] + 1
    assert vit.evaluate(model, [BATCH, wrong]) == 0.8


def test_main_runs_without_internet(monkeypatch, tmp_path):
    # Catches a crash when MNIST is unavailable, and a saved model that does not load or
    # has not been trained.
    argv = ["vit.py", "--depth=1", "--epochs=1", "--batch-size=64"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(vit.MNIST, "mirrors", ["file:///nowhere/"])
    monkeypatch.chdir(tmp_path)
    vit.main()

    saved = torch.load("out/synthetic.pt")
    model = vit.VisionTransformer(**saved["sizes"])
    model.load_state_dict(saved["weights"])
    assert vit.evaluate(model, [BATCH]) > 0.5
