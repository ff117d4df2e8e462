"""Tests of vit.py: against PyTorch's own layers where they exist, on made-up data, offline."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer as TorchvisionViT

import vit

close = torch.testing.assert_close
TINY = "vit.py --embed-dim 16 --depth 1 --n-heads 1 --mlp-ratio 1 --epochs 2 --device cpu"


def make(img_size=12, patch_size=4, in_channels=3, depth=2, n_heads=4, mlp_ratio=2.0, **options):
    """A small model in eval mode whose parameters are all random, so that nothing is zero."""
    torch.manual_seed(0)
    sizes = (img_size, patch_size, in_channels, 5, options.pop("embed_dim", 16), depth, n_heads)
    model = vit.VisionTransformer(*sizes, mlp_ratio, **options).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model, torch.randn(6, 3, 12, 12)


def with_weights(reference, values):
    """The reference in eval mode, with these values as its state, in its own order."""
    reference.load_state_dict(dict(zip(reference.state_dict(), values, strict=True)))
    return reference.eval()


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """vit.main() on a tiny model in an empty folder, with no server to download MNIST from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vit.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(vit, "draw_digits", lambda n, draw=vit.draw_digits: draw(n // 20))

    def main(options=""):
        monkeypatch.setattr(sys, "argv", f"{TINY} {options}".split())
        vit.main()
        return capsys.readouterr()

    return main


def test_shapes():
    mnist = vit.VisionTransformer(28, 7, 1, 10, 64, 4, 4, 2.0)
    assert sum(p.numel() for p in mnist.parameters()) == 139_018
    assert mnist(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    model, images = make(qkv_bias=False)
    assert model(images[:1]).shape == (1, 5) and model.blocks[0].attn.qkv.bias is None
    assert model.features(images).shape == (6, 10, 16)
    assert model.attention_maps(images).shape == (6, 2, 4, 10, 10)
    with torch.device("meta"):  # ViT-B/16 at no cost
        base = vit.VisionTransformer(224, 16, 3, 1000, embed_dim=768, depth=12, n_heads=12)
        assert sum(p.numel() for p in base.parameters()) == 86_567_656
        assert base(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


def test_state_dict_has_the_names_of_timm():
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in layers]
    layers = ["patch_embed.proj", *layers, "norm", "head"]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert list(make()[0].state_dict()) == ["cls_token", "pos_embed", *names]


def test_block_is_torchs_encoder_layer():
    block, x = make()[0].blocks[0], torch.randn(6, 10, 16)
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    values = list(block.state_dict().values())
    with_weights(layer, values[2:6] + values[8:] + values[:2] + values[6:8])
    close(block(x), layer(x))
    close(block(x, n_out=1), layer(x)[:, :1])


def test_model_is_torchvisions():
    model, images = make()
    cls_token, pos_embed, weight, bias, *others = model.state_dict().values()
    reference = TorchvisionViT(12, 4, 2, 4, 16, 32, num_classes=5)
    with_weights(reference, [cls_token, weight, bias, pos_embed, *others])
    close(model(images), reference(images))
    close(model.head(model.features(images)[:, 0]), reference(images))
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_patch_embedding_is_unfold_and_linear():
    embed, images = make()[0].patch_embed, torch.randn(2, 3, 12, 12)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)  # row by row
    close(embed(images), F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))


def test_places_matter_and_the_rest_of_the_batch_does_not():
    model, images = make()
    swapped = images.clone()
    swapped[..., :4, :4], swapped[..., 4:8, 8:] = images[..., 4:8, 8:], images[..., :4, :4]
    assert (model(swapped) - model(images)).abs().max() > 1e-3
    close(torch.cat([model(image[None]) for image in images]), model(images))


def test_every_parameter_learns_from_the_first_step():
    model = vit.VisionTransformer(12, 4, 3, 5, 64, 2, 4)
    loss = F.cross_entropy(model(torch.randn(6, 3, 12, 12)), torch.arange(6) % 5)
    loss.backward()
    assert loss < 2 * math.log(5)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert model.pos_embed.std() < 0.8 and model.cls_token.std() < 0.8


def test_dropout_is_everywhere_and_off_in_eval():
    model, images = make(dropout=0.5)
    dropouts, widths = [m for m in model.modules() if isinstance(m, nn.Dropout)], []
    for dropout in dropouts:
        dropout.register_forward_hook(lambda module, args, out: widths.append(out.shape[2]))
    assert torch.equal(model(images), model(images))
    assert {dropout.p for dropout in dropouts} == {0.5}
    assert widths == 2 * [16, *2 * [16, 32, 16]]  # embedding; attention, both layers of the MLP
    assert not torch.equal(model.train()(images), model(images))


def test_attention_maps_are_what_the_blocks_use():
    model, images = make()
    x, maps = model.embed(images), model.attention_maps(images)
    close(maps.sum(dim=-1), torch.ones(6, 2, 4, 10))
    for i, block in enumerate(model.blocks):
        values = block.attn.split(block.norm1(x))[2]
        x = x + block.attn.proj((maps[:, i] @ values).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    close(model.norm(x), model.features(images))


def test_the_picture_frames_right_in_green_and_wrong_in_red():
    model = vit.VisionTransformer(28, 7, 1, 10, 16, 2, 2, dropout=0.5).eval()
    images, _ = vit.draw_digits(20).tensors
    labels = model(images).argmax(dim=1)
    labels[5:] += 1  # five right, fifteen wrong, of which eight are shown
    tiles = vit.draw_attention(model.train(), images, labels)
    assert tiles.shape == (5 + 8, 3, 2 * 112 + 8, 112 + 8)
    red, green, _ = tiles[:, :, 0, 0].T
    assert (green > red)[:5].all() and (red > green)[5:].all()
    looks = model.attention_maps(images[:13])[:, 1, :, 0, 1:].mean(dim=1).unflatten(1, (1, 4, 4))
    heat = F.interpolate(looks / looks.amax(dim=(2, 3), keepdim=True), (112, 112), mode="bilinear")
    close((tiles[:, 0] - tiles[:, 2])[:, 116:228, 4:116], 0.6 * heat[:, 0])  # red without the digit


IMPOSSIBLE = [("patch_size", 5), ("patch_size", 0), ("n_heads", 3), ("n_heads", 0), ("depth", 0)]
IMPOSSIBLE += [("embed_dim", -16), ("mlp_ratio", 0.0), ("in_channels", 0), ("dropout", 1.5)]


@pytest.mark.parametrize("name, value", IMPOSSIBLE)
def test_impossible_sizes_are_refused(name, value):
    with pytest.raises(ValueError, match=str(value).removesuffix(".0")):
        make(**{name: value})


@pytest.mark.parametrize("shape", [(6, 1, 12, 12), (6, 3, 12, 8), (3, 12, 12)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"3, 12, 12\), got " + re.escape(str(shape))):
        make()[0](torch.zeros(shape))


def test_evaluate_counts_each_image_once_and_changes_nothing():
    model, images = make(dropout=0.5)
    labels, grads = model(images).argmax(dim=1), []
    model.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    assert vit.evaluate(model, loader) == 1.0 and not model.training
    assert vit.evaluate(model.train(), loader) == 1.0
    labels[4:] += 1  # the last batch, of two
    assert vit.evaluate(model, loader) == 4 / 6
    assert model.training and not any(grads)


def test_learning_rates_and_weight_decay():
    model, _ = make()
    optimizers, schedules = vit.make_optimizers(model, 1.0, 0.3, n_steps=100)
    rates = [[], []]
    for _ in range(100):
        for optimizer, schedule, rate in zip(optimizers, schedules, rates, strict=True):
            rate += [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()
    rate, peak = rates[0], rates[0].index(max(rates[0]))
    assert rate == rates[1] == sorted(rate[:peak]) + sorted(rate[peak:], reverse=True)
    assert rate[0] < 0.2 and 0.98 < rate[peak] <= 1 and 0 < peak < 20 and rate[-1] < 0.02
    assert [schedule.get_last_lr() for schedule in schedules] == [[0], [0]]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        is_matrix = re.search(r"(attn.proj|qkv|fc1|fc2|head)\.weight$", name)
        assert decays.pop(p) == (0.3 if is_matrix else 0.0), name
    assert not decays


def test_muons_steps_are_as_large_as_adamws_usual_ones():
    layer = nn.Linear(256, 256)
    before = layer.weight.detach().clone()
    (muon, _), _ = vit.make_optimizers(layer, 1.0, 0.0, n_steps=100)
    layer.weight.grad = torch.randn(256, 256)
    muon.step()
    change = (layer.weight - before).square().mean().sqrt() / muon.param_groups[0]["lr"]
    assert 0.1 < change < 0.3


def test_train_overfits_one_batch():
    torch.manual_seed(0)
    model = vit.VisionTransformer(28, 7, 1, 10, 64, 4, 4, 2.0)
    batch = vit.draw_digits(64).tensors
    vit.train(model, [batch], epochs=50, lr=3e-3)
    assert model.training and vit.evaluate(model, [batch]) == 1.0


def test_train_reports_the_mean_loss_and_stops_if_it_is_not_finite(monkeypatch):
    make_optimizers, made = vit.make_optimizers, []
    spy = lambda *args: made.append(make_optimizers(*args)) or made[-1]
    monkeypatch.setattr(vit, "make_optimizers", spy)
    model, images = make()
    labels, heard = torch.arange(6) % 5, []
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    say = lambda *step: heard.append(step)
    vit.train(model, loader, 1, lr=1e-12, weight_decay=0.3, on_step=say)
    assert [step[:2] for step in heard] == [(1, 1), (1, 2)] and not heard[1][2].requires_grad
    assert model.training  # though it came in eval mode
    close(heard[1][2], F.cross_entropy(model(images), labels).detach())
    assert [s.get_last_lr() for s in made[0][1]] == [[0], [0]]  # they went along, to their end
    assert made[0][0][0].param_groups[0]["weight_decay"] == 0.3
    vit.train(model, loader, 1, lr=1e-12, augment=torch.zeros_like, on_step=say)
    close(heard[-1][2], F.cross_entropy(model(0 * images), labels).detach())
    with pytest.raises(FloatingPointError, match="epoch 1"):
        vit.train(model, [(images * math.inf, labels)])


def test_loaders_shuffle_for_training_only():
    dataset, state = TensorDataset(torch.arange(10)), torch.get_rng_state()
    loaders = [vit.make_loader(dataset, 4, seed) for seed in (None, 0, 0)]
    orders = [torch.cat([batch for (batch,) in loader]) for loader in (*loaders, loaders[1])]
    assert len(loaders[0]) == 3 and torch.equal(orders[0], torch.arange(10))
    assert torch.equal(orders[1], orders[2]) and not torch.equal(orders[1], orders[3])
    assert torch.equal(orders[3].sort()[0], orders[0])
    assert torch.equal(state, torch.get_rng_state())


def test_augment_moves_digits_a_little_and_mirrors_none():
    torch.manual_seed(0)
    images = vit.draw_digits(500).tensors[0]
    moved = vit.augment(images).flatten(1)
    likeness = F.cosine_similarity(moved, images.flatten(1)).mean()
    mirrored = F.cosine_similarity(moved, images.flip(3).flatten(1)).mean()
    assert 0.5 < likeness < 0.98 and mirrored < likeness - 0.1
    close(vit.augment(images, degrees=0, scale=0, shift=0), images, atol=1e-4, rtol=0)


def python(*args, **options):
    command = [sys.executable, "-B", "-W", "error", *args]
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def test_importing_does_nothing(tmp_path):
    code = f"import sys, torch; sys.path.append({str(Path(vit.__file__).parent)!r})\n"
    code += "state = torch.get_rng_state(); import vit; assert state.equal(torch.get_rng_state())"
    assert python("-c", code, cwd=tmp_path) == (0, "", "")
    assert not list(tmp_path.iterdir())


HUGE = ("--embed-dim 1000 --mlp-ratio 2e9", "out of memory, .*--batch-size.*")  # 8 petabytes


@pytest.mark.parametrize("options, words", [("--n-heads 5", "n_heads 5 .*embed_dim 64"), HUGE])
def test_errors_are_one_line(options, words, tmp_path):
    code, out, error = python(vit.__file__, *options.split(), "--device", "cpu", cwd=tmp_path)
    assert (code, out) == (1, "") and re.fullmatch(f"vit.py: error: {words}\n", error)


def test_run_without_mnist_and_twice_the_same(run):
    first = run()
    assert re.search(r"\ndrawn digits test accuracy: \d+\.\d\d%\n$", first.out)
    assert "MNIST could not be had" in first.err and "t10k-labels-idx1-ubyte.gz" in first.err
    assert (first.out + first.err).isascii() and "\r" not in first.out
    with Image.open("out/vit.png") as picture:
        assert picture.mode == "RGB"
    again, other = run("--out-dir again"), run("--out-dir other --seed 1 --lr 1e-9")
    rows = [re.findall(r"\n( +\d .*%)", one.out) for one in (first, again, other)]
    assert rows[0] == rows[1] != rows[2] and len(rows[0]) == 2  # epoch, loss and accuracy
    saved = [torch.load(f"{d}/vit.pt", weights_only=True) for d in ("out", "again", "other")]
    models = [vit.VisionTransformer(**part["architecture"]) for part in saved]
    for model, part in zip(models, saved, strict=True):
        assert part["data"] == "drawn digits"
        model.load_state_dict(part["weights"])
    torch.manual_seed(0)  # where the first two runs began; the third hardly moved from its own
    models.append(vit.VisionTransformer(**saved[0]["architecture"]))
    values = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert torch.equal(values[0], values[1])
    assert not torch.allclose(values[2], values[3], atol=1e-4)


def test_main_passes_on_what_it_is_told(run, monkeypatch):
    told = []

    def spy(model, loader, *rest):
        told.append((len(loader.dataset), loader.sampler.batch_size, *rest[:4]))
        rest[4](1, len(loader), torch.zeros(()))  # an epoch's last step

    monkeypatch.setattr(vit, "train", spy)
    monkeypatch.setattr(vit, "evaluate", lambda model, loader: len(loader.dataset) / 1000)
    monkeypatch.setattr(vit, "draw_attention", lambda _, x, y: told.append(len(x)) or x)
    out = run("--batch-size 7 --epochs 3 --lr 0.5 --weight-decay 0.25").out
    assert told == [(500, 7, 3, 0.5, 0.25, vit.augment), 100]
    assert out.count(" 10.00%") == 2  # both accuracies and the picture are of the 100 test images


def test_mnist_is_read_from_its_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 3), ("t10k", 2)):  # the format: type and axes, sizes, then bytes
        pixels = bytes([*range(0, 256, 51), *[0] * (784 * n - 6)])
        sizes = b"".join(size.to_bytes(4, "big") for size in (n, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(b"\0\0\x08\3" + sizes + pixels)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\1" + sizes[:4] + bytes(range(n)))
    for dataset, n in zip(vit.load_mnist(tmp_path), (3, 2), strict=True):
        images, labels = dataset.tensors
        assert images.shape == (n, 1, 28, 28) and labels.tolist() == list(range(n))
        close(images[0, 0, 0, :7], torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1, 0]))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"])
def test_broken_data_is_an_error_and_stays(run, name, monkeypatch):
    broken, mirror = Path("data/MNIST/raw", name), Path("mirror").resolve()
    broken.parent.mkdir(parents=True)
    mirror.mkdir()
    (mirror / name).write_bytes(b"what a download would put there")
    monkeypatch.setattr(vit.MNIST, "mirrors", [mirror.as_uri() + "/"])
    broken.write_bytes(b"\0\0\x08")
    with pytest.raises(ValueError, match="raw is incomplete or damaged"):
        run()
    assert broken.read_bytes() == b"\0\0\x08" and not Path("out/vit.pt").exists()


BAD = [("--patch-size 5", "patch_size 5 .*28"), ("--epochs 0", "epochs .*1.* 0")]
BAD += [("--lr nan", "lr .*nan"), ("--batch-size -1", "batch_size .*-1")]
BAD += [("--device cuda:99", "cuda:99"), ("--out-dir f", "out_dir f")]


@pytest.mark.parametrize("options, words", BAD)
def test_bad_options_are_refused_before_the_data(run, options, words):
    Path("f").touch()
    with pytest.raises((ValueError, OSError), match=words):
        run(options)
    assert not Path("data").exists()


def test_a_folder_that_takes_no_file_is_refused_before_the_data(run, monkeypatch):
    def refuse(dir):  # an administrator may write anywhere, so no folder of this test would
        raise PermissionError(f"no file in {dir}")

    monkeypatch.setattr(vit.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="out_dir out cannot be written: no file in out"):
        run()
    assert not Path("data").exists()


def test_a_failed_write_leaves_the_old_file(run, monkeypatch):
    def save(_, path):
        Path(path).write_text("half")
        raise OSError("disk full")

    Path("out").mkdir()
    Path("out/vit.pt").write_text("old")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        run()
    assert [path.read_text() for path in Path("out").iterdir()] == ["old"]


def test_the_readmes_python_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    photos = [f"photos/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]
    for name in ("digit.png", *photos):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 50), 64).convert("RGB").save(name)
    sizes = {"img_size": 28, "patch_size": 7, "in_channels": 1, "num_classes": 10}
    sizes |= {"embed_dim": 64, "depth": 4, "n_heads": 4, "mlp_ratio": 2.0}
    weights = vit.VisionTransformer(**sizes).state_dict()
    Path("out").mkdir()
    torch.save({"architecture": sizes, "weights": weights}, "out/vit.pt")
    deit = vit.VisionTransformer(224, 16, 3, 1000, embed_dim=192, depth=12, n_heads=3)
    torch.save({"model": deit.state_dict()}, "deit_tiny_patch16_224.pth")

    monkeypatch.setattr(vit, "load_mnist", lambda folder: [vit.draw_digits(130)] * 2)
    once = lambda *args, train=vit.train, **others: train(*args, **others | {"epochs": 1})
    monkeypatch.setattr(vit, "train", once)
    env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    readme, names = Path(vit.__file__).with_name("README.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, names)  # noqa: S102
    close(names["probabilities"].sum(-1), torch.ones(8))
    assert names["looks"].shape == (4, 4)
