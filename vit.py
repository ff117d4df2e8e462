# SPDX-License-Identifier: MIT-0
"""A minimal Vision Transformer (ViT) in PyTorch, trained on MNIST: run, read, copy it.

    python vit.py           # train for 8 epochs, then test
    python vit.py --help    # list the options

A transformer reads a sentence as a sequence of words. A Vision Transformer reads an
image as a sequence of patches ("An Image is Worth 16x16 Words", Dosovitskiy et al.,
2020, https://arxiv.org/abs/2010.11929). One image on its way through the model that
this file trains:

    image         (1, 28, 28)  one gray channel, from 0 (black) to 1 (white)
    patches       (16, 49)     a 4 x 4 grid of patches, 7 x 7 pixels each
    tokens        (16, 64)     a linear layer turns each patch into a vector
    class token   (17, 64)     one more token, [CLS], stands for the whole image
    positions     (17, 64)     a learned vector tells each token where it is
    blocks        (17, 64)     4 times: attention passes information between tokens,
                               then an MLP processes each token by itself
    head          (10)         a linear layer turns [CLS] into a logit per digit

Differences from the paper:

- Data: 60,000 augmented digits, not millions of photos. Training takes minutes.
- Optimizer: AdamW with a one-cycle learning rate, where the paper uses Adam and SGD.
- Initial weights: PyTorch's own for all layers; others gained nothing on MNIST.
- Classification head: one linear layer. The paper has a second one in pretraining.

Letters in shapes: B images in a batch, C channels, H height and W width in pixels,
P patch size, T tokens (patches and [CLS]), D embedding dimension, h attention heads.
"""

import argparse
import math
import socket
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms.functional import to_pil_image, to_tensor

# --- The model ------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Cut images into patches, turn each into a token: (B, C, H, W) -> (B, T - 1, D).

    Raises ValueError if patch_size does not divide img_size, or if images are not of
    shape (B, in_channels, img_size, img_size).
    """

    def __init__(self, img_size, patch_size, in_channels, embed_dim):
        super().__init__()
        if img_size % patch_size != 0:
            raise ValueError(
                f"patch_size must divide img_size, got {patch_size} and {img_size}"
            )
        self.image_shape = (in_channels, img_size, img_size)

        # A convolution whose stride equals its kernel size visits each patch once and
        # applies the same linear layer to its pixels: cutting and embedding in one.
        self.proj = nn.Conv2d(
            in_channels, embed_dim, kernel_size=patch_size, stride=patch_size
        )

    def forward(self, images):
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"expected images of shape {('B', *self.image_shape)}, "
                f"got {tuple(images.shape)}"
            )

        # From a grid of patches to a sequence of tokens.
        x = self.proj(images)  # (B, D, H/P, W/P)
        x = x.flatten(2)  # (B, D, T - 1)
        return x.transpose(1, 2)  # (B, T - 1, D)


class Attention(nn.Module):
    """Multi-head self-attention between tokens: (B, T, D) -> (B, T, D).

    Raises ValueError if n_heads does not divide embed_dim.
    """

    def __init__(self, embed_dim, n_heads, qkv_bias, dropout):
        super().__init__()
        if embed_dim % n_heads != 0:
            raise ValueError(
                f"n_heads must divide embed_dim, got {n_heads} and {embed_dim}"
            )
        self.n_heads = n_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.softmax = nn.Softmax(dim=3)  # a module: a hook can read its results
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # Each token compares its query (what it looks for) with the keys of all tokens
        # (what they offer) and averages their values (what they pass on) by how well
        # they match. A linear layer computes all three from each token. Each head does
        # this with D/h numbers of its own: a token can look for several things at once.
        qkv = self.qkv(x).unflatten(2, (3, self.n_heads, -1))  # (B, T, 3, h, D/h)
        qkv = qkv.transpose(1, 3)  # swap T and h: (B, h, 3, T, D/h)
        q, k, v = qkv.unbind(2)  # each (B, h, T, D/h)

        # A score is the dot product of a query and a key: high if they match. Large
        # scores would make softmax pick a single token and leave almost no gradient.
        # For independent numbers of mean 0 and variance 1, this sum of D/h products has
        # variance D/h, so the square root of D/h is divided out.
        q = q / math.sqrt(q.shape[3])  # before the product, or float16 may overflow
        scores = q @ k.transpose(2, 3)  # (B, h, T, T): queries in rows, keys in columns

        # Softmax turns each row of scores into weights that sum to 1. With them, each
        # token receives a weighted average of all values.
        weights = self.softmax(scores)
        x = weights @ v  # (B, h, T, D/h)

        # For long sequences on a GPU, x = F.scaled_dot_product_attention(q, k, v) can
        # replace the two paragraphs above, if attention_maps is not needed.

        # Put the results of the heads side by side, each in its own part of the token.
        # Then a linear layer combines what the heads have found.
        x = x.transpose(1, 2).flatten(2)  # (B, T, D)
        return self.dropout(self.proj(x))


class MLP(nn.Module):
    """Linear layer, GELU, linear layer, on each token by itself: (B, T, D) -> same."""

    def __init__(self, embed_dim, hidden_dim, dropout):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        # Attention only averages what it gathers from other tokens. The MLP computes
        # new features from it: the wide first layer looks for many, GELU (a smooth
        # ReLU) suppresses negative values, and the second layer combines the rest.
        x = self.fc1(x)  # (B, T, hidden_dim)
        x = F.gelu(x)
        x = self.dropout(x)
        x = self.fc2(x)  # (B, T, D)
        return self.dropout(x)


class Block(nn.Module):
    """Attention between tokens, then an MLP on each: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim, n_heads, mlp_ratio, qkv_bias, dropout):
        super().__init__()
        # LayerNorm brings the numbers of each token to mean 0 and variance 1, then
        # scales and shifts them by learned amounts: the next layer gets an input of
        # stable size. eps, which avoids division by 0, is that of the authors' code.
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(
            embed_dim=embed_dim, n_heads=n_heads, qkv_bias=qkv_bias, dropout=dropout
        )
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio), dropout)

    def forward(self, x):
        # Residual connections: attention and MLP do not replace a token but add to it.
        # Gradients pass through sums unchanged, so even the first block learns quickly.
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class VisionTransformer(nn.Module):
    """Classify images: (B, in_channels, img_size, img_size) -> logits (B, num_classes).

    embed_dim: numbers per token. depth: number of blocks. n_heads: attention heads per
    block. mlp_ratio: hidden size of the MLP, as a multiple of embed_dim. qkv_bias:
    whether queries, keys and values have a bias. dropout: probability. With
    num_classes=0 there is no head: the result is the class token (B, embed_dim).

    The defaults are those of ViT-B/16, the paper's base model. Parameters are named as
    in timm, the leading library of pretrained image models, so that its plain ViT
    checkpoints load unchanged.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_channels=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        n_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        dropout=0.0,
    ):
        super().__init__()

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=embed_dim,
        )

        # The class token starts as the same vector for every image. Block by block, it
        # gathers from the patches what the head needs to know about the image. It
        # starts with a standard deviation of 0.2, as measured on embedded patches of
        # MNIST, so that neither drowns the other.
        self.cls_token = nn.Parameter(0.2 * torch.randn(1, 1, embed_dim))

        # Attention ignores order: shuffled patches would look the same to it. So a
        # learned vector for its position, with the same start, is added to each token.
        n_tokens = 1 + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(0.2 * torch.randn(1, n_tokens, embed_dim))
        self.dropout = nn.Dropout(dropout)

        blocks = [
            Block(
                embed_dim=embed_dim,
                n_heads=n_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                dropout=dropout,
            )
            for _ in range(depth)
        ]
        self.blocks = nn.Sequential(*blocks)

        # Blocks add to the tokens, whose numbers grow: normalize again before the head.
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(embed_dim, num_classes)

    def embed(self, images):
        """Turn images into tokens, [CLS] first: (B, C, H, W) -> (B, T, D)."""
        patches = self.patch_embed(images)  # (B, T - 1, D)
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls_token, patches], dim=1)  # (B, T, D)
        return self.dropout(x + self.pos_embed)

    def forward_features(self, images):
        """Return the normalized tokens after all blocks: (B, C, H, W) -> (B, T, D)."""
        x = self.embed(images)
        x = self.blocks(x)
        return self.norm(x)

    def forward(self, images):
        tokens = self.forward_features(images)
        return self.head(tokens[:, 0])

    def attention_maps(self, images):
        """Return all attention weights: (B, C, H, W) -> (B, depth, h, T, T).

        The last two axes are query token and key token; each row sums to 1. The model
        should be in eval mode, or dropout changes the weights.
        """
        maps = []

        def keep(module, inputs, weights):
            maps.append(weights)

        # While a block runs, PyTorch calls keep with what its softmax returns. At the
        # end of each "with", it removes this hook.
        x = self.embed(images)
        for block in self.blocks:
            with block.attn.softmax.register_forward_hook(keep):
                x = block(x)
        return torch.stack(maps, dim=1)


# --- The data -------------------------------------------------------------------------


def load_mnist(folder):
    """Return the training and the test set of MNIST, downloaded to folder if necessary.

    Each is a TensorDataset of images (1, 28, 28), from 0 to 1, and labels, 0 to 9.
    """
    datasets = []
    for is_training_set in (True, False):
        mnist = MNIST(folder, train=is_training_set, download=True)

        # Convert all images once: torchvision would convert each again in every epoch.
        images = mnist.data.unsqueeze(1) / 255
        datasets.append(TensorDataset(images, mnist.targets))
    return datasets


def augment(images):
    """Rotate, scale and shift each image at random: (B, C, H, H) -> (B, C, H, H).

    By up to about 10 degrees, 10% and 2 pixels; uncovered pixels become 0. The model
    sees new variants in each epoch, so that it cannot memorize the training set.
    Takes square float images on any device.
    """
    # Four random numbers from -1 to 1 for each image.
    random = images.new_empty(4, images.shape[0]).uniform_(-1, 1)
    angle = math.radians(10) * random[0]
    scale = 1 + 0.1 * random[1]
    shift_x = 2 * random[2]
    shift_y = 2 * random[3]

    # A matrix for each image: rotation times scale, and in the last column the shift.
    # It maps each position in the result to its source in the image, so that a scale
    # above 1 shrinks the digit. Positions run from -1 to 1: a pixel measures 2 / H.
    pixel = 2 / images.shape[2]
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    x_row = torch.stack([cos, -sin, shift_x * pixel])
    y_row = torch.stack([sin, cos, shift_y * pixel])
    matrix = torch.stack([x_row, y_row])  # (2, 3, B)
    matrix = matrix.permute(2, 0, 1)  # (B, 2, 3)

    # Compute the source of each pixel in the result, then interpolate the image there.
    grid = F.affine_grid(matrix, images.shape, align_corners=False)  # (B, H, H, 2)
    return F.grid_sample(images, grid, align_corners=False)


def make_synthetic_digits(n):
    """Return a TensorDataset of n augmented digits in Pillow's default font."""
    digits = []
    for digit in range(10):
        image = Image.new("L", (28, 28))
        canvas = ImageDraw.Draw(image)
        canvas.text((14, 14), str(digit), fill=255, anchor="mm", font_size=24)
        digits.append(to_tensor(image))

    labels = torch.arange(n) % 10
    images = torch.stack(digits)[labels]
    return TensorDataset(augment(images), labels)


def load_digits(folder):
    """Return name, training set, test set: MNIST or, failing that, synthetic digits.

    Synthetic digits, which are far easier, let everything run without internet access.
    Raises RuntimeError if MNIST files are present but cannot be loaded.
    """
    raw = Path(folder, "MNIST", "raw")
    raw.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(20)  # seconds; torchvision would wait for a server forever

    try:
        return "MNIST", *load_mnist(folder)
    except Exception as error:
        if any(raw.glob("*ubyte*")):  # all files of MNIST have ubyte in their name
            raise RuntimeError(
                f"cannot load MNIST from {raw}: if it is incomplete or damaged, delete "
                "that folder and run again with internet access"
            ) from error
        print(f"{error}\nNo MNIST: training on synthetic digits.", file=sys.stderr)

    train_set = make_synthetic_digits(10_000)
    test_set = make_synthetic_digits(2_000)
    return "synthetic digits", train_set, test_set


# --- Training -------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, loader):
    """Return the accuracy, from 0 to 1, on batches of (images, labels).

    Leaves the model in eval mode.
    """
    device = next(model.parameters()).device
    model.eval()  # dropout off

    correct = []
    for images, labels in loader:
        predictions = model(images.to(device)).argmax(dim=1)
        correct.append(predictions == labels.to(device))
    return torch.cat(correct).float().mean().item()


def train(
    model,
    loader,
    test_loader=None,
    epochs=5,
    lr=1e-3,
    weight_decay=0.05,
    augment=None,
):
    """Train the model in place, on its device; return a list of losses, one per step.

    loader, test_loader: batches of (images, labels); loader needs len().
    lr: peak learning rate; 1e-3 suits small models, 1e-4 large or pretrained ones.
    augment: a function applied to the images of each training batch.

    Prints loss, test accuracy and speed of each epoch. Leaves the model in eval mode.
    Raises FloatingPointError if the mean loss of an epoch is not finite.
    """
    device = next(model.parameters()).device

    # AdamW divides each parameter's step by the typical size of its gradient, so that
    # all move at a similar pace. Weight decay shrinks them slightly at each step, so
    # that none grows without need. Biases decay too: exempting them gained nothing.
    # fused: 5% faster on a CPU.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=weight_decay, fused=True
    )

    # Warm-up: at first, AdamW has seen too few gradients to know their typical size, so
    # the learning rate starts low and rises to lr, by default in 30% of the steps. Then
    # it falls to almost 0, so that the model settles. OneCycleLR would vary the
    # momentum too; that made short runs worse.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=lr,
        epochs=epochs,
        steps_per_epoch=len(loader),
        cycle_momentum=False,
    )

    losses = torch.zeros(epochs, len(loader), device=device)
    for epoch in range(epochs):
        model.train()  # dropout on, even after evaluate has turned it off
        start = time.perf_counter()
        n_images = 0

        for step, (images, labels) in enumerate(loader):
            images = images.to(device)
            labels = labels.to(device)
            if augment is not None:
                images = augment(images)

            # Forward: compute the logits and the loss, the mean of -log(p), where p is
            # the probability that the model gives to the true class.
            logits = model(images)
            loss = F.cross_entropy(logits, labels)

            # Backward: compute the gradient of the loss with respect to each parameter.
            optimizer.zero_grad()
            loss.backward()

            # Update: move each parameter against its gradient.
            optimizer.step()
            scheduler.step()

            # Keep the loss on its device: .item() in each step would wait for the GPU.
            losses[epoch, step] = loss.detach()
            n_images += labels.shape[0]
            if sys.stdout.isatty():
                print(f"epoch {epoch + 1}: step {step + 1}/{len(loader)}", end="\r")

        # Report the epoch. Here, .item() waits for the GPU only once.
        mean_loss = losses[epoch].mean().item()
        speed = n_images / (time.perf_counter() - start)
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f"loss of epoch {epoch + 1} is not finite: try a lower learning rate"
            )
        report = f"epoch {epoch + 1}/{epochs}: loss {mean_loss:.4f}"
        if test_loader is not None:
            report += f", test accuracy {evaluate(model, test_loader):.2%}"
        print(f"{report}, {speed:,.0f} images/s", flush=True)

    model.eval()
    return losses.flatten().tolist()


# --- The command ----------------------------------------------------------------------


@torch.no_grad()
def draw_results(model, images, labels, losses):
    """Return a picture of digits, the attention of [CLS] to them, and the losses.

    Needs a model in eval mode and images (n, 1, H, H) from 0 to 1, all on the CPU.
    """
    picture = Image.new("RGB", (840, 500), "white")
    canvas = ImageDraw.Draw(picture, "RGBA")
    canvas.font = ImageFont.load_default(13)

    # A row of digits classified correctly, then a row of misclassified ones.
    predictions = model(images).argmax(dim=1)
    wrong = predictions != labels
    rows = [(8, "classified correctly", ~wrong), (168, "misclassified", wrong)]
    for top, title, chosen in rows:
        indices = chosen.nonzero().flatten()
        text = f"{len(indices)} of {len(labels)} {title}"
        canvas.text((8, top), text, "black")

        for column, i in enumerate(indices[:8]):
            x = 8 + 104 * column
            y = top + 40
            text = f"{labels[i]} read as {predictions[i]}"
            canvas.text((x, y - 16), text, "black")
            picture.paste(to_pil_image(images[i]).resize((96, 96)), (x, y))

            # How much [CLS], token 0, attends to each patch: last block, mean over
            # heads.
            maps = model.attention_maps(images[i : i + 1])  # (1, depth, h, T, T)
            attention = maps[0, -1, :, 0, 1:].mean(dim=0)  # (T - 1)

            # Outline each patch and tint it: the most, if its attention is 40% or more.
            n_rows = math.isqrt(len(attention))
            size = 96 / n_rows
            for j, weight in enumerate(attention):
                left = x + size * (j % n_rows)
                upper = y + size * (j // n_rows)
                box = (left, upper, left + size, upper + size)
                opacity = min(int(500 * weight), 200)  # 255 would hide the digit
                canvas.rectangle(box, (255, 128, 0, opacity), "white", width=2)

    # The legend of the tint.
    text = "orange: attention of [CLS] in the last block; strongest: 40% or more"
    canvas.text((400, 8), text, "black")

    # The loss of each step as a curve, in a frame.
    top = max(losses)
    points = []
    for step, loss in enumerate(losses):
        points.append((8 + 824 * step / len(losses), 490 - 150 * loss / top))
    canvas.line(points, "steelblue")
    canvas.rectangle((8, 340, 832, 490), outline="gray")
    text = f"loss of each training step, from 0 (bottom) to {top:.2f} (top)"
    canvas.text((400, 346), text, "black")
    return picture


def parse_options():
    """Return the command-line options."""
    best_device = "cpu"
    if torch.accelerator.is_available():
        best_device = torch.accelerator.current_accelerator()

    groups = {
        # The sizes of the model.
        "model": [
            ("--patch-size", 7, "side of a patch in pixels"),
            ("--embed-dim", 64, "embedding dimension: numbers per token"),
            ("--depth", 4, "number of blocks"),
            ("--n-heads", 4, "attention heads per block"),
            ("--mlp-ratio", 2.0, "hidden size of the MLP, as a multiple of embed-dim"),
            ("--dropout", 0.0, "dropout probability; MNIST needs none"),
        ],
        # How it is trained.
        "training": [
            ("--epochs", 8, "passes over the training set"),
            ("--batch-size", 128, "images per step"),
            ("--lr", 5e-3, "peak learning rate; use less for larger models"),
            ("--weight-decay", 0.05, "weight decay of AdamW"),
            ("--seed", 0, "random seed"),
            ("--device", best_device, "cpu, cuda, cuda:1, mps, ..."),
        ],
        # What it reads and writes.
        "files": [
            ("--data-dir", Path("data"), "folder for MNIST, downloaded if absent"),
            ("--out-dir", Path("out"), "folder for the trained model and a picture"),
        ],
    }

    # An option has the type of its default.
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for name, default, text in rows:
            group.add_argument(name, type=type(default), default=default, help=text)
    return parser.parse_args()


def main():
    options = parse_options()
    torch.manual_seed(options.seed)
    options.out_dir.mkdir(parents=True, exist_ok=True)

    # The model to train.
    sizes = {
        "img_size": 28,
        "patch_size": options.patch_size,
        "in_channels": 1,
        "num_classes": 10,
        "embed_dim": options.embed_dim,
        "depth": options.depth,
        "n_heads": options.n_heads,
        "mlp_ratio": options.mlp_ratio,
        "dropout": options.dropout,
    }
    model = VisionTransformer(**sizes).to(options.device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters on {options.device}")

    # The data.
    data, train_set, test_set = load_digits(options.data_dir)
    loader = DataLoader(train_set, batch_size=options.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=500)
    print(f"{data}: {len(train_set):,} training images, {len(test_set):,} test images")

    # The training.
    losses = train(
        model,
        loader,
        test_loader=test_loader,
        epochs=options.epochs,
        lr=options.lr,
        weight_decay=options.weight_decay,
        augment=augment,
    )
    accuracy = evaluate(model, test_loader)

    # The trained model. Moved to the CPU, its weights load on any machine.
    name = "mnist" if data == "MNIST" else "synthetic"
    model_path = options.out_dir / f"{name}.pt"
    torch.save({"sizes": sizes, "weights": model.cpu().state_dict()}, model_path)

    # The picture, of digits among the first 2000 in the test set.
    images, labels = test_set[:2000]
    picture_path = options.out_dir / f"{name}.png"
    draw_results(model, images, labels, losses).save(picture_path)

    print(f"wrote {model_path} and {picture_path}")
    print(f"{data} test accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    main()
