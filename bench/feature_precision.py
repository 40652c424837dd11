"""Do features of half precision, or of TF32, give the same labels as those of float32?

python bench/feature_precision.py                               tiny CLIP with its weights, 2,040 drawn images
python bench/feature_precision.py --folder PHOTOS               images of a folder instead, see `read_folder`
python bench/feature_precision.py --folder PHOTOS --model ViT-B-16-quickgelu --size 256 128      random weights
python bench/feature_precision.py --quick                       a smoke test: 340 images, nothing stored

For every precision and eps: the ARI between its labels and those of float32, every outlier a cluster of its own, the least
cosine of an image's two features, and the ARI to the identities. `again` is float32 with batches of another size.
Products are computed in float32 from rounded numbers, as the hardware does it: operands of 8 (bf16), 11 (fp16) or 11 (TF32)
binary digits, sums in float32, results rounded to the type again except in TF32. So it needs no such hardware; all other
operations are torch's own under autocast. Results go to bench/results/feature_precision.json.
"""

import argparse
import math
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from measure import ari, store
from torch.overrides import TorchFunctionMode

from pclclip_nb.backbones.create import create_backbone
from pclclip_nb.batches.augmentation import image_norm
from pclclip_nb.batches.loading import Files, test_loader
from pclclip_nb.clustering import jaccard_dbscan
from pclclip_nb.data import read_folder
from pclclip_nb.synthetic.people import make_synthetic_reid
from pclclip_nb.synthetic.tiny_clip import tiny_backbone

WORK, TINY = Path(__file__).parent.parent / "runs" / "bench_feature_precision", "pclclip-tiny"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
RADII = (0.4, 0.5, 0.6, 0.7)
KEY = ("model", "images", "data", "precision", "eps")


def tf32(x):
    "The nearest numbers of 11 binary digits"
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Products(TorchFunctionMode):
    "Inside the block, layers multiply rounded numbers and add in float32"

    def __init__(self, precision):
        super().__init__()
        self.half = HALF.get(precision)

    def __torch_function__(self, f, types, args=(), kwargs=None):
        names = {F.linear: 2, torch.addmm: 3, torch.conv2d: 2, F.conv2d: 2}  # how many operands are rounded
        if f is F.scaled_dot_product_attention and self.half is None:
            q, k, v = map(tf32, args)
            return tf32((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)) @ v
        if f not in names:
            return f(*args, **(kwargs or {}))
        low = tf32 if self.half is None else lambda x: x.to(self.half).float()
        with torch.autocast("cpu", enabled=False):
            rounded = [low(x) if isinstance(x, torch.Tensor) and x.ndim > 1 else x for x in args]
            rounded = [x.float() if isinstance(x, torch.Tensor) else x for x in rounded]
            out = f(*rounded, **(kwargs or {}))
            return out if self.half is None else out.to(self.half)


@torch.no_grad()
def features(net, table, precision, batch=64):
    "(N, d), by the backbone in evaluation mode"
    half = HALF.get(precision)
    loader, parts = test_loader(Files(table, net.size), batch, image_norm(net)), []
    for images, _ in loader:
        with torch.autocast("cpu", half, enabled=half is not None):
            if precision == "fp32":
                parts.append(net(images))
            else:
                with Products(precision):
                    parts.append(net(images))
    return torch.cat(parts)


def comparisons(net, table, precisions):
    "A row for each precision and radius"
    exact = features(net, table, "fp32")
    truth = {eps: jaccard_dbscan(exact, eps) for eps in RADII}
    for precision in ("again", *precisions):
        other = features(net, table, "fp32", 24) if precision == "again" else features(net, table, precision)
        cosine = (exact * other).sum(1).min().item()
        for eps in RADII:
            labels = jaccard_dbscan(other, eps)
            counts = dict(clusters=int(truth[eps].max() + 1), outliers=int((truth[eps] < 0).sum()))
            scores = dict(ari=ari(truth[eps], labels), cosine=cosine)
            scores |= dict(ari_pids=ari(table.pid, labels), ari_pids_fp32=ari(table.pid, truth[eps]))
            yield dict(precision=precision, eps=eps, **scores, **counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="photographs; without it people are drawn")
    parser.add_argument("--pattern", default=r"(?P<pid>\d+)_c(?P<camid>\d+)", help="of the file names")
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--weights", help="file of the model's trunk; without it they are random, or tiny CLIP's own")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), help="height and width")
    parser.add_argument("--precision", nargs="+", default=["tf32", "fp16", "bf16"])
    parser.add_argument("--images", type=int, default=2040)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    n = 340 if args.quick else args.images
    torch.manual_seed(0)
    net = tiny_backbone() if args.model == TINY else create_backbone(args.model, None, tuple(args.size))
    if args.weights:
        state = torch.load(args.weights, weights_only=True)
        net.trunk.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier")})
    if args.folder:
        table = read_folder(args.folder, pattern=args.pattern)
    else:
        table = make_synthetic_reid(
            WORK / f"data{n}", n_train=n // 17, n_test=1, per_id=17, n_distractors=0, progress=False
        )
        table = table[table.split == "train"]
    table = table.iloc[:: max(1, len(table) // n)].reset_index(drop=True)
    what = dict(model=args.model, images=len(table), data="photographs" if args.folder else "drawn people")
    rows = [what | row for row in comparisons(net.eval(), table, args.precision)]
    print(*what.values())
    print(pd.DataFrame(rows).drop(columns=list(what)).round(5).to_string(index=False))
    if not args.quick:
        store("feature_precision", KEY, rows)


if __name__ == "__main__":
    main()
