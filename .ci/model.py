"""The model loads timm's weights and gives timm's logits; it compiles, exports and trains in bfloat16."""

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch.utils.data import DataLoader

from vit import VisionTransformer, augment, draw_digits, evaluate, train

close = torch.testing.assert_close
torch.manual_seed(0)
images = torch.randn(2, 3, 224, 224)

for name, classes, dim, heads in [
    ("vit_tiny_patch16_224", 1000, 192, 3),
    ("deit_small_patch16_224", 1000, 384, 6),
    ("vit_small_patch16_224.dino", 0, 384, 6),
]:
    theirs = timm.create_model(name, pretrained=False, num_classes=classes).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ours = VisionTransformer(224, 16, 3, classes, embed_dim=dim, depth=12, n_heads=heads).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        difference = (ours(images) - theirs(images)).abs().max()
        close(ours(images), theirs(images))
        close(ours.features(images), theirs.forward_features(images))
    print(f"{name}: strict load, largest difference {difference:.1e}")

pos_embed = ours.pos_embed.detach()
grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
grid = F.interpolate(grid, (24, 24), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
close(torch.cat([pos_embed[:, :1], grid], dim=1), resample_abs_pos_embed(pos_embed, (24, 24)))
print("position embedding: the README's interpolation is timm's")

model = VisionTransformer(28, 7, 1, 10, 64, 4, 4, mlp_ratio=2.0).eval()
images = torch.rand(5, 1, 28, 28)
close(torch.compile(model, fullgraph=True)(images), model(images), atol=1e-5, rtol=1e-4)
batch = torch.export.Dim("batch")
exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},)).module()
for n in (1, 2, 5):
    close(exported(images[:n]), model(images[:n]))
print("compiled as one graph; exported for batches of any size")

for dtype in (torch.bfloat16, torch.float16, torch.float64):
    for side in (28, 224):
        moved = augment(torch.ones(2, 3, side, side, dtype=dtype))
        assert moved.dtype == dtype and moved.min() >= 0 and moved.max() <= 1.01, (dtype, side)
checks = (torch.arange(224)[:, None] // 4 + torch.arange(224) // 4).fmod(2).expand(8, 1, -1, -1)
torch.manual_seed(0)
moved = augment(checks.float())
torch.manual_seed(0)
with torch.autocast("cpu", torch.bfloat16):
    close(augment(checks.float()), moved)
print("augment takes images of every precision and size, and is exact under autocast")

loader = DataLoader(draw_digits(64), batch_size=64)
model = VisionTransformer(28, 7, 1, 10, 64, 4, 4, mlp_ratio=2.0)
with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
    train(model, loader, epochs=40, lr=3e-3)
assert evaluate(model, loader) > 0.5  # 0.1 with the cache
print("learns in bfloat16 under autocast, as the README has it")
