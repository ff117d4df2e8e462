# SPDX-License-Identifier: MIT
"""A Vision Transformer from scratch in PyTorch, trained on MNIST.

The model of "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2020, arXiv:2010.11929) in one
file to run, to copy and to read from top to bottom:

    python vit.py           # 5 epochs, two minutes on two CPU cores, 99.17 % of the test digits
                            # right (mean of seeds 0 to 4 on one thread each, 99.06 to 99.30)
    python vit.py --help    # every hyperparameter is an option

Letters in shapes: B batch, C channels, H height and W width of an image, P side of a patch,
N patches, T = 1 + N tokens, D width of a token, K heads.
"""

import argparse
import math
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image


def option(default, reason, low=1):
    """A hyperparameter: its default, its line in --help, and the lowest value allowed."""
    return field(default=default, metadata={"help": reason, "low": low})


@dataclass
class Hyperparameters:
    """All that `python vit.py` can be told: each field is an option, data_dir is --data-dir."""

    data_dir: str = option("data", "folder with MNIST, downloaded into it if absent")
    out_dir: str = option("out", "folder for the model, vit.pt, and a picture, vit.png")
    epochs: int = option(5, "passes over the training images")
    batch_size: int = option(256, "images a step; fewer are slower, in more steps")
    lr: float = option(1e-2, "peak learning rate, lower for large models, small patches", low=1e-9)
    weight_decay: float = option(0.05, "on matrices only", low=0)
    seed: int = option(0, "the same on the same machine gives the same numbers", low=0)
    device: str = option("", "cpu, cuda, cuda:1, mps, ...; by default the best one present")
    patch_size: int = option(7, "pixels a side: 7 cuts 28 x 28 into 16 patches, 4 into 49")
    embed_dim: int = option(64, "width of a token")
    depth: int = option(4, "number of blocks")
    n_heads: int = option(4, "attention heads, each embed_dim / n_heads wide")
    mlp_ratio: float = option(2.0, "hidden width of the MLP / embed_dim", low=1e-9)
    dropout: float = option(0.0, "0 to 1, after the embedding and every layer but qkv", low=0)


class PatchEmbed(nn.Module):
    """Cut images into square patches and embed each: (B, C, H, W) -> (B, N, D).

    Raises ValueError if patches do not tile an image, or if an image has another shape.
    """

    def __init__(self, img_size, patch_size, in_channels, embed_dim):
        super().__init__()
        if min(img_size, patch_size) < 1 or img_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide img_size {img_size}")
        self.image_shape = (in_channels, img_size, img_size)
        # Steps as wide as the kernel: this is one Linear on the P * P * C numbers of each patch.
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        if images.shape[1:] != self.image_shape:
            expected = ("B", *self.image_shape)
            raise ValueError(f"expected images of shape {expected}, got {tuple(images.shape)}")
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, D, H/P, W/P) -> (B, N, D)


class Attention(nn.Module):
    """Let each token gather from all tokens, in several heads: (B, T, D) -> (B, T, D).

    Multi-head self-attention (paper, appendix A). Raises ValueError if D is no multiple of K.
    """

    def __init__(self, embed_dim, n_heads, qkv_bias=True, dropout=0.0):
        super().__init__()
        if n_heads < 1 or embed_dim % n_heads:
            raise ValueError(f"n_heads {n_heads} does not divide embed_dim {embed_dim}")
        self.n_heads = n_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def split(self, x):
        """Queries, keys and values of each head: (B, T, D) -> 3 x (B, K, T, D/K)."""
        parts = self.qkv(x).chunk(3, dim=2)
        return [part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in parts]

    def forward(self, x, n_queries=None):
        q, k, v = self.split(x)
        # softmax(q k^T / sqrt(D/K)) v, for the first n_queries tokens; None is all of them
        x = F.scaled_dot_product_attention(q[:, :, :n_queries], k, v)
        x = x.transpose(1, 2).flatten(2)  # a token's heads side by side again: (B, T, D)
        return self.dropout(self.proj(x))

    def weights(self, x):
        """How much each token gathers from each: (B, T, D) -> (B, K, T, T); rows sum to 1."""
        q, k, _ = self.split(x)
        # A dot product grows with the root of its length; divided by it, softmax stays soft.
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)


class MLP(nn.Module):
    """Transform each token by itself: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim, hidden_dim, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Attention, then an MLP (paper, equations 2 and 3): (B, T, D) -> (B, n_out or T, D)."""

    def __init__(self, embed_dim, n_heads, mlp_ratio=4.0, qkv_bias=True, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, n_heads, qkv_bias, dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio), dropout)

    def forward(self, x, n_out=None):
        # The norms stand inside the branches: along the sum, gradients reach any depth unchanged.
        x = x[:, :n_out] + self.attn(self.norm1(x), n_out)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Classify images: (B, in_channels, img_size, img_size) -> logits (B, num_classes).

    Parameters have timm's names, so published checkpoints load. With num_classes 0 there is no
    head, and the output is the class token. Dropout is where the paper has it (appendix B.1).
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, img_size, patch_size, in_channels, num_classes, embed_dim, depth, n_heads,
                 mlp_ratio=4.0, qkv_bias=True, dropout=0.0):  # fmt: skip
        super().__init__()
        sizes = {"in_channels": in_channels, "embed_dim": embed_dim, "depth": depth}
        sizes["mlp_ratio * embed_dim"] = int(mlp_ratio * embed_dim)
        if min(sizes.values()) < 1:
            raise ValueError(f"sizes must be at least 1, got {sizes}")
        self.patch_embed = PatchEmbed(img_size, patch_size, in_channels, embed_dim)
        # The class token stands for no patch: it gathers from all of them what the head reads.
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        # Attention is blind to order: a learned vector for each place says where a token is.
        n_tokens = 1 + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, n_tokens, embed_dim))
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(embed_dim, n_heads, mlp_ratio, qkv_bias, dropout) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def init_weights(self):
        """Draw all weights anew (norms are PyTorch's: ones and zeros)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # Xavier keeps activations at one scale whatever the width; N(0, 0.02) is for 768.
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Large, so that places differ from the first step on: with 0.2, training starts later.
        nn.init.normal_(self.cls_token, std=0.5)
        nn.init.normal_(self.pos_embed, std=0.5)

    def embed(self, images):
        """Images to tokens (paper, equation 1): (B, C, H, W) -> (B, T, D)."""
        x = self.patch_embed(images)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, T, D)
        return self.dropout(x + self.pos_embed)

    def features(self, images, n_tokens=None):
        """Final tokens, or the first n_tokens: (B, C, H, W) -> (B, T, D); token 0 is [CLS]."""
        x = self.blocks[:-1](self.embed(images))
        return self.norm(self.blocks[-1](x, n_tokens))

    def forward(self, images):
        # The head reads only [CLS], so that is all the last block computes: the same, but faster.
        return self.head(self.features(images, n_tokens=1)[:, 0])

    def attention_maps(self, images):
        """Where tokens look, by block: (B, C, H, W) -> (B, depth, K, T, T); rows sum to 1."""
        x, maps = self.embed(images), []
        for block in self.blocks:
            maps.append(block.attn.weights(block.norm1(x)))
            x = block(x)
        return torch.stack(maps, dim=1)


def load_mnist(folder):
    """MNIST for training and for testing: images (n, 1, 28, 28) from 0 to 1, labels (n).

    Downloaded if folder/MNIST/raw is empty: raises ConnectionError if that fails, and ValueError
    if files are there but cannot be used.
    """
    raw = Path(folder, "MNIST", "raw")
    absent = not any(raw.glob("*"))
    try:
        for name, md5 in MNIST.resources:  # torchvision would overwrite a broken archive
            if (raw / name).exists() and not check_integrity(raw / name, md5):
                raise ValueError(f"{name} is cut off or not MNIST's")
        splits = [MNIST(folder, train, download=True) for train in (True, False)]
        return [TensorDataset(split.data[:, None] / 255, split.targets) for split in splits]
    except Exception as error:  # torchvision has many, AssertionError included
        reason = " ".join(str(error).split()) or type(error).__name__
        if absent:
            advice = f"To train on it, put {', '.join(dict(MNIST.resources))} into {raw}."
            raise ConnectionError(f"MNIST could not be had: {reason}\n{advice}") from error
        raise ValueError(f"{raw} is incomplete or damaged, move it away: {reason}") from error


def augment(images, degrees=10, scale=0.1, shift=2):
    """Turn, scale and shift each image a little, at random: (B, C, H, W) -> (B, C, H, W).

    By up to `degrees`, the share `scale` and `shift` pixels, either way; 0 fills the edges.
    """
    turn, zoom, right, down = 2 * torch.rand(4, len(images), device=images.device) - 1
    turn, zoom, shift = math.radians(degrees) * turn, 1 + scale * zoom, 2 * shift / images.shape[3]
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    affine = torch.stack([cos, -sin, shift * right, sin, cos, shift * down], dim=1)
    grid = F.affine_grid(affine.view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def draw_digits(n):
    """A stand-in for MNIST: n digits in Pillow's own font, turned, scaled, shifted and noised."""
    row, font = Image.new("L", (280, 28)), ImageFont.load_default(size=24)
    for i in range(10):
        ImageDraw.Draw(row).text((28 * i + 14, 14), str(i), fill=255, font=font, anchor="mm")
    labels = torch.arange(n) % 10
    images = augment(to_tensor(row).unflatten(2, (10, 28)).permute(2, 0, 1, 3)[labels])
    return TensorDataset((images + 0.1 * torch.randn_like(images)).clamp(0, 1), labels)


def make_loader(dataset, batch_size, seed=None):
    """A DataLoader that takes each batch by one index; with a seed, in a new order every epoch."""
    # A generator of its own: whatever else is drawn, the order of the images stays the same.
    generator = torch.Generator().manual_seed(seed or 0)
    shuffled = RandomSampler(dataset, generator=generator)
    order = BatchSampler(range(len(dataset)) if seed is None else shuffled, batch_size, False)
    return DataLoader(dataset, batch_size=None, sampler=order, generator=generator)


def make_optimizers(model, lr, weight_decay, n_steps):
    """Muon for matrices, AdamW for the rest; their lr rises for n_steps / 10, then falls to 0."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    # Muon (Jordan, 2024, kellerjordan.github.io/posts/muon) makes each change of a matrix nearly
    # orthogonal: all its directions learn at one pace, so few epochs do. Three of its iterations
    # are near enough. Scaled to the usual change of AdamW, it can share AdamW's lr.
    muon = torch.optim.Muon(
        matrices, lr, weight_decay, momentum=0.9, ns_steps=3, adjust_lr_fn="match_rms_adamw"
    )
    # No decay here: biases, norms and embeddings say where, not how much.
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    share = lambda step: min(10 * (step + 1), (n_steps - step) / 0.9) / (n_steps + 1)
    return (muon, adamw), [torch.optim.lr_scheduler.LambdaLR(o, share) for o in (muon, adamw)]


def train(model, loader, epochs=5, lr=1e-3, weight_decay=0.05, augment=None, on_step=None):
    """Train the model in place, on its device; loader gives (images, labels) and has a length.

    augment(images) changes each batch. on_step(epoch, step, loss) is called after each step with
    the mean loss of the epoch so far. Raises FloatingPointError if that is not finite at its end.
    """
    device = next(model.parameters()).device
    optimizers, schedules = make_optimizers(model, lr, weight_decay, epochs * len(loader))
    for epoch in range(1, epochs + 1):
        model.train()
        total, n_images = 0.0, 0
        for step, (images, labels) in enumerate(loader, 1):
            images, labels = images.to(device), labels.to(device)
            if augment:
                images = augment(images)
            loss = F.cross_entropy(model(images), labels)
            model.zero_grad()
            loss.backward()
            for part in (*optimizers, *schedules):
                part.step()
            total += loss.detach() * len(labels)  # still a tensor: .item() would wait for the GPU
            n_images += len(labels)
            if on_step:
                on_step(epoch, step, total / n_images)
        if not total.isfinite():
            raise FloatingPointError(f"the loss of epoch {epoch} is not finite, try a lower lr")


@torch.no_grad()
def evaluate(model, loader):
    """The share of images classified right, a float from 0 to 1; loader gives (images, labels)."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # or dropout goes on
    correct, n_images = 0, 0
    for images, labels in loader:
        correct += (model(images.to(device)).argmax(dim=1) == labels.to(device)).sum()
        n_images += len(labels)  # the last batch may be smaller: a mean of means would be wrong
    model.train(was_training)
    return int(correct) / n_images


@torch.no_grad()
def draw_attention(model, images, labels, n=8):
    """n images that the model gets right, framed green, and n that it gets wrong, framed red.

    Each is cut into its patches; below it, where the class token looks in the last block (mean
    over heads). (B, C, H, W) from 0 to 1 -> tiles (up to 2n, 3, 8H + 8, 4W + 8).
    """
    model.eval()
    right = torch.cat([model(part).argmax(dim=1) for part in images.split(500)]) == labels
    chosen = torch.cat([which.nonzero()[:n, 0] for which in (right, ~right)])
    looks = model.attention_maps(images[chosen])[:, -1, :, 0, 1:].mean(dim=1)  # (up to 2n, N)
    side = math.isqrt(looks.shape[1])
    digits = F.interpolate(images[chosen], scale_factor=4)
    heat = (looks / looks.amax(dim=1, keepdim=True)).view(-1, 1, side, side)
    heat = F.interpolate(heat, digits.shape[2:], mode="bilinear")
    below = torch.cat([0.4 * digits + share * heat for share in (0.6, 0.3, 0.0)], dim=1)
    cut = digits.shape[2] // side
    digits[:, :, cut::cut], digits[:, :, :, cut::cut] = 0.5, 0.5
    tiles = F.pad(torch.cat([digits.expand_as(below), below], dim=2), (4, 4, 4, 4), value=-1)
    green, red = images.new_tensor([[0.1, 0.7, 0.2], [0.9, 0.1, 0.1]])
    frames = torch.where(right[chosen, None], green, red)[..., None, None]
    return torch.where(tiles < 0, frames, tiles)


def parse_options():
    """Hyperparameters from the command line; raises ValueError for a number out of range."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Hyperparameters):
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, type=f.type, default=f.default, help=f.metadata["help"])
    hp = Hyperparameters(**vars(parser.parse_args()))
    for f in fields(hp):
        low, value = f.metadata["low"], getattr(hp, f.name)
        if f.type is not str and not low <= value <= 2**31:
            raise ValueError(f"{f.name} must be from {low} to {2**31}, got {value}")
    return hp


def main():
    hp = parse_options()
    device = hp.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    out_dir = Path(hp.out_dir)
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every backend has its own
        raise ValueError(f"device {device} does not work here, try --device cpu") from error
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()  # now rather than after the training
    except OSError as error:
        raise ValueError(f"out_dir {out_dir} cannot be written: {error}") from error

    torch.manual_seed(hp.seed)
    names = ("patch_size", "embed_dim", "depth", "n_heads", "mlp_ratio", "dropout")
    architecture = {name: getattr(hp, name) for name in names}
    architecture |= {"img_size": 28, "in_channels": 1, "num_classes": 10}
    model = VisionTransformer(**architecture).to(device)

    socket.setdefaulttimeout(20)  # seconds; torchvision would wait for a silent server forever
    try:
        data, splits = "MNIST", load_mnist(hp.data_dir)
    except ConnectionError as error:
        drawn = "Drawn digits take its place: their accuracy says nothing of MNIST."
        print(error, drawn, sep="\n", file=sys.stderr)
        data, splits = "drawn digits", [draw_digits(10_000), draw_digits(2_000)]
    train_set, test_set = (TensorDataset(*(t.to(device) for t in s.tensors)) for s in splits)
    loader = make_loader(train_set, hp.batch_size, hp.seed)
    test_loader = make_loader(test_set, 500)

    reason = "--device" if hp.device else "the best one present"
    print(f"torch {torch.__version__} on {device} ({reason})")
    print(f"Vision Transformer with {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"{data}: {len(train_set):,} images for training, {len(test_set):,} for testing")
    print("epoch    loss  test accuracy  images/s  seconds", flush=True)
    start = began = time.perf_counter()

    def report(epoch, step, loss):
        nonlocal began
        if step < len(loader):
            if sys.stdout.isatty():
                print(f"{epoch:5}  {step / len(loader):6.0%}", end="\r", flush=True)
            return
        loss, now = loss.item(), time.perf_counter()
        accuracy, speed = evaluate(model, test_loader), len(train_set) / (now - began)
        began = time.perf_counter()
        line = f"{epoch:5}  {loss:6.4f}  {accuracy:13.2%}  {speed:8,.0f}  {began - start:7.1f}"
        print(line, flush=True)

    train(model, loader, hp.epochs, hp.lr, hp.weight_decay, augment, report)
    checkpoint = {"architecture": architecture, "weights": model.state_dict(), "data": data}
    # Written beside their places and moved there: neither file is ever half-written.
    with tempfile.TemporaryDirectory(dir=out_dir) as beside:
        torch.save(checkpoint, Path(beside, "vit.pt"))
        Path(beside, "vit.pt").replace(out_dir / "vit.pt")
        tiles = draw_attention(model, *test_set.tensors)
        save_image(tiles, Path(beside, "vit.png"), padding=6, pad_value=1)
        Path(beside, "vit.png").replace(out_dir / "vit.png")
    print(f"{data} test accuracy: {evaluate(model, test_loader):.2%}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the model is only saved at the end", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"vit.py: error: {error}")
    except RuntimeError as error:
        if "tried to allocate" not in str(error).lower():  # part of what each backend says
            raise
        sys.exit("vit.py: error: out of memory, try a lower --batch-size or a smaller model")
