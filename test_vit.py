"""Tests of vit.py: against PyTorch's own layers, on made-up data, without a network."""

import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.models import VisionTransformer as TorchvisionViT

import vit

close = torch.testing.assert_close


def make(**options):
    """A small model in eval mode, all of whose parameters are random, and six images."""
    torch.manual_seed(0)
    sizes = {"img_size": 12, "patch_size": 4, "in_channels": 3, "num_classes": 5, "embed_dim": 16}
    model = vit.VisionTransformer(**sizes | {"depth": 2, "n_heads": 4} | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(6, 3, 12, 12)


def test_parameters_number_have_timms_names_and_all_learn():
    model = vit.VisionTransformer(28, 7, 1, 10, 64, 4, 4, mlp_ratio=2.0)
    assert sum(p.numel() for p in model.parameters()) == 139_018
    assert all(0.1 < p.std() < 0.3 for p in (model.cls_token, model.pos_embed))
    F.cross_entropy(model(torch.rand(5, 1, 28, 28)), torch.arange(5)).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model, images = make(qkv_bias=False, num_classes=0)
    assert model(images[:1]).shape == (1, 16) and model.features(images).shape == (6, 10, 16)
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *[f"blocks.{i}.{x}" for i in range(2) for x in layers], "norm"]
    names = ["cls_token", "pos_embed", *[f"{x}.{y}" for x in layers for y in ("weight", "bias")]]
    assert list(model.state_dict()) == [name for name in names if "qkv.bias" not in name]


def test_the_model_is_torchvisions():
    model, images = make(mlp_ratio=2.0)
    cls_token, pos_embed, weight, bias, *others = model.state_dict().values()
    reference = TorchvisionViT(12, 4, 2, 4, 16, 32, num_classes=5).eval()
    values = [cls_token, weight, bias, pos_embed, *others]
    reference.load_state_dict(dict(zip(reference.state_dict(), values, strict=True)))
    close(model(images), reference(images))
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_dropout_follows_the_embedding_and_every_layer_but_qkv_and_is_off_in_eval():
    (model, images), widths = make(dropout=0.5), []
    for dropout in [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]:
        dropout.register_forward_hook(lambda _, x, y: widths.append(y.shape[2] * (y == 0).any()))
    assert model.train()(images).any() and widths == [16, *2 * [16, 64, 16]]
    assert torch.equal(model.eval()(images), model(images))


def test_attention_maps_rebuild_the_features():
    model, images = make()
    x, maps = model.embed(images), model.attention_maps(images)
    for i, block in enumerate(model.blocks):
        values = block.attn.qkv(block.norm1(x))[:, :, 32:].unflatten(2, (4, 4)).transpose(1, 2)
        x = x + block.attn.proj((maps[:, i] @ values).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    close(model.norm(x), model.features(images))


def test_sizes_that_do_not_fit_are_refused():
    for name, value in [("patch_size", 5), ("patch_size", 0), ("n_heads", 3), ("n_heads", 0)]:
        with pytest.raises(ValueError, match=f"{name} {value} .* (img_size 12|embed_dim 16)"):
            make(**{name: value})
    for shape in [(6, 1, 12, 12), (6, 3, 12, 8), (3, 12, 12)]:
        with pytest.raises(ValueError, match=r"3, 12, 12\), got " + re.escape(str(shape))):
            make()[0](torch.zeros(shape))


def test_train_overfits_one_batch_and_the_learning_rate_rises_and_falls():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = vit.VisionTransformer(28, 7, 1, 10, 64, 4, 4, mlp_ratio=2.0).to(device).eval()
    batch, groups = vit.draw_digits(64).tensors, []
    hook = register_optimizer_step_pre_hook(lambda o, *_: groups.append(dict(o.param_groups[0])))
    vit.train(model, [batch], epochs=60, lr=5e-3, weight_decay=0.3)
    hook.remove()
    assert {(group["weight_decay"], *group["betas"]) for group in groups} == {(0.3, 0.9, 0.999)}
    rates = [group["lr"] for group in groups]
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True) and 10 < peak < 25
    assert rates[0] < 5e-4 and 4.9e-3 < rates[peak] <= 5e-3 and rates[-1] < 1e-4
    assert model.training and vit.evaluate(model, [batch]) == 1.0


def test_train_prints_means_over_all_images_and_stops_if_the_loss_is_not_finite(capsys):
    model, images = make()
    labels = model(images).argmax(dim=1)
    labels[4:] = (labels[4:] + 1) % 5
    expected = F.cross_entropy(model(images / 2), labels).item()
    batches = list(zip(images.split(4), labels.split(4), strict=True))  # of 4 and of 2
    vit.train(model, batches, batches[1:], 1, lr=1e-12, augment=lambda images: images / 2)
    loss, accuracy = re.search(r"loss (\S+), .* (\S+)%,", capsys.readouterr().out).groups()
    assert abs(float(loss) - expected) < 1e-4 and accuracy == "0.00"
    assert vit.evaluate(model.train(), batches) == 4 / 6 and not model.training
    vit.train(model.bfloat16(), [(images.bfloat16() / 2, labels)] * 300, epochs=1, lr=1e-12)
    assert abs(float(re.search(r"loss (\S+),", capsys.readouterr().out)[1]) - expected) < 0.05
    with pytest.raises(FloatingPointError, match="epoch 1"):
        vit.train(make()[0], [(images * torch.inf, labels)])


def test_mnist_is_read_from_its_files(tmp_path):
    (raw := tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for name, n in (("train", 3), ("t10k", 2)):  # the format: type and axes, sizes, then bytes
        sizes = b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + sizes + b"3" * 784 * n)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + sizes[:4] + bytes(range(n)))
    for dataset, n in zip(vit.load_mnist(tmp_path), (3, 2), strict=True):
        close(dataset.tensors[0], torch.full((n, 1, 28, 28), 51 / 255))
        assert dataset.tensors[1].tolist() == list(range(n))


def test_augment_turns_scales_and_shifts_each_image_within_its_limits():
    torch.manual_seed(0)
    images = torch.zeros(500, 1, 40, 80, dtype=torch.float64)
    images[:250, :, 12:28, 40:42] = images[250:, :, 19:21, 33:49] = 1  # bars, upright and lying
    moved = vit.augment(images)[:, 0]
    mass = moved / moved.sum(dim=(1, 2), keepdim=True)
    y, x = torch.arange(40)[:, None] - 19.5, torch.arange(80)[None] - 40.5
    mean = lambda values: (mass * values).sum(dim=(1, 2), keepdim=True)
    right, down, size = mean(x), mean(y), moved.mean(dim=(1, 2)).div(images[0].mean()).sqrt() - 1
    turn = mean((x - right) * (y - down)) / mean((y - down) ** 2 - (x - right) ** 2)
    for change, limit in ((turn, 0.175), (size, 0.1), (right, 5.6), (down, 2.8)):
        assert all(0.9 < e / limit < 1.3 for h in change.split(250) for e in (h.max(), -h.min()))


def test_main_without_a_network_repeats_itself_and_saves(monkeypatch, tmp_path, capsys):
    draw, sets, printed = vit.draw_digits, [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vit.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(vit, "draw_digits", lambda n: sets.append(draw(n // 20)) or sets[-1])
    for out_dir in ("a", "b"):
        options = "--embed-dim 16 --depth 1 --n-heads 2 --epochs 2 --lr 0.01 --device cpu --out-dir"
        monkeypatch.setattr("sys.argv", ["vit.py", *options.split(), out_dir])
        vit.main()
        printed.append(re.findall(r"loss \S+,|\S+%", capsys.readouterr().out))
    assert printed[0] == printed[1] and len(printed[0]) == 5
    saved = torch.load("a/vit.pt", weights_only=True)
    model = vit.VisionTransformer(**saved["architecture"])
    model.load_state_dict(saved["weights"])
    assert f"{vit.evaluate(model, [sets[1].tensors]):.2%}" == printed[0][-1]
    Image.open("a/vit.png").verify()
