"""The model against timm's, and in the ways in which others use it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers import make_model
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

import vit

IMAGES = torch.rand(3, 1, 28, 28)

TIMM_MODELS = {
    "vit_tiny_patch16_224": {"embed_dim": 192, "n_heads": 3},
    "deit_small_patch16_224": {"embed_dim": 384, "n_heads": 6},
    "vit_small_patch16_224.dino": {"embed_dim": 384, "n_heads": 6, "num_classes": 0},
}


@pytest.mark.parametrize("name", TIMM_MODELS)
@torch.no_grad()
def test_timm_checkpoint_gives_the_same(name):
    # Catches another name, epsilon, or GELU, other features, and untrained parameters.
    theirs = timm.create_model(name).eval()
    for parameter in theirs.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)
    ours = vit.VisionTransformer(**TIMM_MODELS[name]).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert all(parameter.requires_grad for parameter in ours.parameters())

    # Rounding makes at most 4e-6, another GELU or epsilon at least 7e-4.
    images = torch.randn(2, 3, 224, 224)
    expected = theirs.forward_features(images)
    assert_close(ours(images), theirs(images), atol=5e-5, rtol=0)
    assert_close(ours.forward_features(images), expected, atol=5e-5, rtol=0)


def test_qkv_bias_can_be_left_out():
    # Catches a qkv_bias that is not passed on.
    with_bias = set(make_model().state_dict())
    without = set(make_model(qkv_bias=False).state_dict())
    assert with_bias - without == {f"blocks.{i}.attn.qkv.bias" for i in range(3)}


def test_learned_tokens_start_with_their_spread():
    # Catches zeros and another standard deviation. They train, too, but worse.
    model = make_model(embed_dim=4000, depth=0)
    for parameter in model.cls_token, model.pos_embed:
        assert parameter.std().item() == pytest.approx(0.2, abs=0.02)


def test_errors_name_both_figures():
    # Catches a missing check, and a message that does not say what was given.
    with pytest.raises(ValueError, match="patch_size must divide .* 5 and 28"):
        make_model(patch_size=5)
    with pytest.raises(ValueError, match="n_heads must divide .* 5 and 24"):
        make_model(n_heads=5)
    with pytest.raises(AssertionError, match=r"is 28, .*3, 1, 32, 28"):
        make_model()(torch.rand(3, 1, 32, 28))


def test_torchvision_extracts_features_of_any_block():
    # Catches Python that torch.fx cannot trace, and blocks of other names.
    model = make_model().eval()
    x = model.embed(IMAGES)
    features = create_feature_extractor(model, ["blocks.1", "norm"])(IMAGES)
    assert_close(features["blocks.1"], model.blocks[:2](x))
    assert_close(features["norm"], model.forward_features(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_weights_are_finite(dtype):
    # Catches scores that are scaled too late: 24 * 60 * 60 exceeds float16's 65,504.
    attention = make_model(n_heads=1).blocks[0].attn
    torch.nn.init.zeros_(attention.qkv.weight)
    torch.nn.init.constant_(attention.qkv.bias, 60)
    weights = attention.to(dtype).attention_weights(torch.rand(3, 17, 24).to(dtype))
    assert_close(weights, torch.full_like(weights, 1 / 17))


def test_attention_maps_from_four_threads():
    # Catches maps that are kept in the model, where threads overwrite each other's.
    model = make_model().eval()
    batches = list(torch.rand(40, 8, 1, 28, 28))
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(model.attention_maps, batches))
    assert all(map(torch.equal, maps, map(model.attention_maps, batches)))
    assert not maps[0].requires_grad  # so that .numpy() works


@pytest.fixture(params=["forward", "attention_maps"])
def model(request):
    """Return the tiny model, which computes logits, or one that computes maps."""
    model = make_model().eval()
    model.forward = getattr(model, request.param)
    return model


def test_compiles_as_one_graph(model):
    # Catches Python that torch.compile cannot follow (aot_eager saves 20 seconds).
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(IMAGES), model(IMAGES))


def test_exports_for_batches_of_any_size(model):
    # Catches a batch size that is read as a Python number, such as len(images).
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (IMAGES[:2],), dynamic_shapes=shapes).module()
    for n in (1, 3):
        assert_close(exported(IMAGES[:n]), model(IMAGES[:n]))
