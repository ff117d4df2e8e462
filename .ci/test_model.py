"""The model against timm's, and in the ways in which others use it."""

import inspect

import pytest
import timm
import torch
from helpers import TINY_SIZES
from torch.testing import assert_close

import vit

# timm's name of a model; its classes, embedding dimension and heads.
TIMM_MODELS = [
    ("vit_tiny_patch16_224", 1000, 192, 3),
    ("deit_small_patch16_224", 1000, 384, 6),
    ("vit_small_patch16_224.dino", 0, 384, 6),
]


def make_images(n=3):
    """Return images for the tiny model."""
    torch.manual_seed(0)
    return torch.rand(n, 1, 28, 28)


def make_model(**options):
    """Return the tiny model, in eval mode, with weights that are far from 0 and 1."""
    torch.manual_seed(0)
    model = vit.VisionTransformer(**TINY_SIZES | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# --- Equal to timm's models -----------------------------------------------------------


# The largest difference. Rounding makes 4e-6, another GELU or epsilon at least 7e-4.
TOLERANCE = 5e-5


def make_timm_pair(name, num_classes, embed_dim, n_heads):
    """Return timm's model with random weights, and this one with the same weights."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=num_classes).eval()

    # No parameter may be 0 or 1, or a mistake in it could go unseen.
    for parameter in theirs.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)

    ours = vit.VisionTransformer(
        num_classes=num_classes,
        embed_dim=embed_dim,
        n_heads=n_heads,
    ).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("sizes", TIMM_MODELS)
@torch.no_grad()
def test_logits_match_timm(sizes):
    # Catches a parameter of another name or shape, and any mistake in the computation.
    theirs, ours = make_timm_pair(*sizes)
    images = torch.randn(2, 3, 224, 224)
    logits = ours(images)
    assert_close(logits, theirs(images), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("sizes", TIMM_MODELS)
@torch.no_grad()
def test_features_match_timm(sizes):
    # Catches features before the last LayerNorm, and [CLS] in another place.
    theirs, ours = make_timm_pair(*sizes)
    images = torch.randn(2, 3, 224, 224)
    features = ours.forward_features(images)
    expected = theirs.forward_features(images)
    assert_close(features, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_parameter_names_are_those_of_timm(qkv_bias):
    # Catches a qkv_bias that is not passed on, and names in another order.
    ours = vit.VisionTransformer(**TINY_SIZES, qkv_bias=qkv_bias)
    theirs = timm.models.VisionTransformer(
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=10,
        embed_dim=24,
        depth=3,
        num_heads=2,
        mlp_ratio=1.5,
        qkv_bias=qkv_bias,
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())


# --- How it is built ------------------------------------------------------------------


def test_defaults_are_those_of_timm():
    # Catches another default size: timm's are those of ViT-B/16.
    ours = inspect.signature(vit.VisionTransformer).parameters
    theirs = inspect.signature(timm.models.VisionTransformer).parameters
    renamed = {
        "in_channels": "in_chans",
        "n_heads": "num_heads",
        "dropout": "drop_rate",
    }
    for name, parameter in ours.items():
        their_name = renamed.get(name, name)
        assert parameter.default == theirs[their_name].default


def test_layer_norm_has_the_epsilon_of_timm():
    # Catches PyTorch's default of 1e-5: the outputs would differ, but by very little.
    norms = []
    for module in make_model().modules():
        if isinstance(module, torch.nn.LayerNorm):
            norms.append(module)
    assert len(norms) == 7  # two in each of three blocks, one at the end
    assert {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize("name", ["cls_token", "pos_embed"])
def test_learned_tokens_start_with_their_spread(name):
    # Catches zeros, ones and another standard deviation. They train, too, but worse.
    torch.manual_seed(0)
    sizes = TINY_SIZES | {"embed_dim": 4000, "depth": 0}
    model = vit.VisionTransformer(**sizes)
    std, mean = torch.std_mean(model.get_parameter(name))
    assert mean.item() == pytest.approx(0, abs=0.02)
    assert std.item() == pytest.approx(0.2, abs=0.02)


# --- Dropout --------------------------------------------------------------------------

# With a probability of 1, dropout turns all numbers to 0, which shows its place.


@pytest.fixture
def block():
    """Return a block whose dropout drops everything."""
    model = make_model(dropout=1.0)
    return model.train().blocks[0]


def keep_input(layer):
    """Return a list that gets the input of this layer."""
    inputs = []

    def note(module, args):
        inputs.extend(args)

    layer.register_forward_pre_hook(note)
    return inputs


def test_dropout_after_the_embedding():
    # Catches no dropout there, and one that spares the position embedding or [CLS].
    model = make_model(dropout=1.0).train()
    tokens = model.embed(make_images())
    assert tokens.count_nonzero() == 0


def test_dropout_after_attention(block):
    # Catches no dropout there, and one before the last layer, which has a bias.
    tokens = torch.randn(3, 17, 24)
    result = block.attn(tokens)
    assert result.count_nonzero() == 0


def test_no_dropout_inside_attention(block):
    # Catches dropout of queries, keys, values or weights: the paper has none there.
    tokens = torch.randn(3, 17, 24)
    inputs = keep_input(block.attn.proj)
    block.attn(tokens)
    assert inputs[0].all()


def test_dropout_inside_the_mlp(block):
    # Catches no dropout after the first layer.
    tokens = torch.randn(3, 17, 24)
    inputs = keep_input(block.mlp.fc2)
    block.mlp(tokens)
    assert inputs[0].count_nonzero() == 0


def test_dropout_after_the_mlp(block):
    # Catches no dropout after the second layer.
    tokens = torch.randn(3, 17, 24)
    result = block.mlp(tokens)
    assert result.count_nonzero() == 0


def test_dropout_is_off_in_eval_mode():
    # Catches dropout that does not ask for the mode.
    images = make_images()
    logits = make_model(dropout=0.5)(images)
    assert_close(logits, make_model(dropout=0.0)(images))


# --- Attention maps -------------------------------------------------------------------


@torch.no_grad()
def test_attention_maps_rebuild_the_features():
    # Catches maps of another block, head or image, and axes that are swapped.
    model = make_model()
    images = make_images()
    maps = model.attention_maps(images)

    # Each block once more, but with the weights that the maps show.
    x = model.embed(images)
    for i, block in enumerate(model.blocks):
        qkv = block.attn.qkv(block.norm1(x))  # (B, T, 3 * D)
        values = qkv[:, :, 48:].unflatten(2, (2, 12))  # (B, T, h, D/h)
        mixed = torch.einsum("bhqk,bkhd->bqhd", maps[:, i], values)
        x = x + block.attn.proj(mixed.flatten(2))
        x = x + block.mlp(block.norm2(x))
    assert_close(model.norm(x), model.forward_features(images))


@pytest.mark.parametrize("side", [28, 29])
def test_attention_maps_leave_no_hook(side):
    # Catches hooks that stay, also after an error: each would keep later maps alive.
    model = make_model()
    images = torch.rand(3, 1, side, side)
    try:
        model.attention_maps(images)
    except ValueError:
        assert side == 29
    for module in model.modules():
        assert not module._forward_hooks  # PyTorch has no public name for it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_maps_are_finite(dtype):
    # Catches scores that are scaled too late. Unscaled, they are 24 * 60 * 60 = 86,400
    # here, but float16 ends at 65,504.
    model = make_model(n_heads=1).to(dtype)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
        torch.nn.init.constant_(block.attn.qkv.bias, 60)
    maps = model.attention_maps(make_images().to(dtype))
    assert maps.isfinite().all()


# --- Used by others -------------------------------------------------------------------


def test_one_image_gives_the_same_alone():
    # Catches images of a batch that influence each other.
    model = make_model()
    images = make_images()
    logits = model(images)
    for i in range(3):
        alone = model(images[i : i + 1])
        assert_close(alone[0], logits[i])


def test_compiles_as_one_graph():
    # Catches Python that torch.compile cannot follow. aot_eager: without machine code,
    # which takes 20 seconds and has no part in that.
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = make_images()
    assert_close(compiled(images), model(images))


def test_exports_for_batches_of_any_size():
    # Catches a batch size that is read as a Python number, such as len(images).
    model = make_model()
    example = (make_images(2),)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
    exported = program.module()
    for n in (1, 2, 5):
        images = make_images(n)
        assert_close(exported(images), model(images))
