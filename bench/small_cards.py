"""GPU memory that a training step needs, counted without a GPU, for batches of 256 images of 256x128 and small cards.

python bench/small_cards.py                               every network, precision, accumulate and grad_checkpoint below
python bench/small_cards.py --networks resnet50           only these
python bench/small_cards.py --quick                       a smoke test: the smallest parts of one network, nothing stored

The step is that of `Stepper`: forward, loss against 750 clusters, backward and the optimiser, on the simulated CUDA device
with torch's fake tensors inside, which have a size but no data. Every storage counts from its birth to its end, in blocks of
512 bytes like those of torch's CUDA allocator. Three rules of CUDA that the simulated device does not have are added:
attention is a fused kernel, and autocast computes layer norms and powers in float32. Not counted: the CUDA context, the work
space of cuDNN and cuBLAS, fragmentation, and batches that a loader prepares ahead.
Results go to bench/results/small_cards.json.
"""

import argparse
import json
import sys
import time
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from measure import RESULTS, store
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from pclclip_nb.backbones.create import create_backbone
from pclclip_nb.core.attention import set_grad_checkpoint
from pclclip_nb.memory_loss import contrastive_loss
from pclclip_nb.training.settings import TrainConfig, make_optimizer
from pclclip_nb.training.steps import Stepper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / ".ci"))
import simulated_cuda  # noqa: E402

NETWORKS = ("ViT-B-16-quickgelu", "pass_vit_small", "resnet50")
SIZE, BATCH, CLUSTERS = (256, 128), 256, 750
PARTS = (1, 2, 4, 8, 16)
CARDS = (8, 11, 16, 24)  # GB
BLOCK = 512  # bytes, the smallest piece that torch's CUDA allocator gives out
ATEN = torch.ops.aten
NO_TRAFFIC = (ATEN.empty, ATEN.empty_like, ATEN.empty_strided, ATEN.new_empty, ATEN.new_empty_strided, ATEN.detach)
NO_TRAFFIC += (ATEN._unsafe_view, ATEN._reshape_alias)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages on the simulated device that are alive, and the most there were; with them the FLOP of matrix
    products, convolutions and attention, and the bytes that all other operations read and write"""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, WeakIdKeyDictionary()
        self.flop, self.traffic = 0, 0

    def add(self, tensor):
        "Count the storage of a device tensor, once, until it is freed"
        if not isinstance(tensor, simulated_cuda.SimulatedTensor):
            return
        storage = tensor.inner.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = -(-storage.nbytes() // BLOCK) * BLOCK
            weakref.finalize(storage, self.free, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, out)):
            self.add(tensor)
        self.add_work(func, args, kwargs, out)
        return out

    def add_work(self, func, args, kwargs, out):
        "Count what an operation computes or moves; a view does neither"
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        elif not func.is_view and func.overloadpacket not in NO_TRAFFIC:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, simulated_cuda.SimulatedTensor)]
            self.traffic += sum(x.numel() * x.element_size() for x in tensors)


def fused_attention(q, k, v):
    "Attention as the fused kernels of CUDA compute it: nothing of size t x t is kept"
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def in_float32(function):
    "The function with its tensors in float32 under autocast, as CUDA's autocast calls it"

    def call(*args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        return function(*(a.float() if isinstance(a, torch.Tensor) else a for a in args), **kwargs)

    return call


@contextmanager
def fake_card():
    "The simulated device with fake tensors inside, and with CUDA's rules for attention, layer norms and powers"
    simulated_cuda.install()
    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(F, "scaled_dot_product_attention", fused_attention))
        stack.enter_context(patch(F, "layer_norm", in_float32(F.layer_norm)))
        stack.enter_context(patch(torch.Tensor, "pow", in_float32(torch.Tensor.pow)))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


class Clusters:
    "The loss of `ClusterMemory`, without its checks of the labels, which read them"

    def __init__(self, d):
        self.centroids = torch.empty(CLUSTERS, d, device="cuda")

    def loss(self, feats, labels):
        return contrastive_loss(feats, torch.zeros(len(feats), dtype=torch.int64, device="cuda"), self.centroids)


def without_data(net):
    "The network, its tensors replaced by fake ones on the card"

    def fake(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    for module in net.modules():
        module._parameters |= {
            k: nn.Parameter(fake(p), p.requires_grad) for k, p in module._parameters.items() if p is not None
        }
        module._buffers |= {k: fake(b) for k, b in module._buffers.items() if b is not None}
    return net.train()


def counted_step(net, precision, accumulate=1, grad_checkpoint=False, batch=BATCH):
    "`LiveBytes` of a step, and the bytes alive before it; the network loses its weights"
    parts = min(accumulate, 2)  # from the second part on, beside the gradients of those before, all are alike
    used = batch // accumulate * parts
    with fake_card():
        net = set_grad_checkpoint(without_data(net), grad_checkpoint)
        step = Stepper(net, make_optimizer(net, cfg=TrainConfig()), None, precision, parts)
        memory = Clusters(net.d)
        images, others = (torch.empty(n, 3, *net.size, device="cuda") for n in (used, batch - used))
        states = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
        with LiveBytes() as live:
            for tensor in [*net.parameters(), *net.buffers(), *states, images, others, memory.centroids]:
                live.add(tensor)
            held = live.now
            step(images, torch.zeros(used, dtype=torch.int64), memory)
        return live, held


def cases(network):
    "Precision, accumulate and grad_checkpoint of the rows of a network, in the order in which they are counted"
    for precision in ("bf16", "fp32"):
        yield from ((precision, accumulate, False) for accumulate in PARTS)
        if "vit" in network.lower():
            yield precision, 1, True


def count(network):
    "Rows of a network; of each precision as many parts as the smallest card needs"
    net, enough = create_backbone(network, None, SIZE), set()
    for precision, accumulate, checkpoint in cases(network):
        if precision in enough and not checkpoint:
            continue
        began = time.perf_counter()
        live, held = counted_step(net, precision, accumulate, checkpoint)
        gb, share = live.peak / 1e9, min(accumulate, 2) / accumulate  # of the batch that was counted
        if gb <= usable_gb(CARDS[0]):
            enough.add(precision)
        row = dict(network=network, precision=precision, accumulate=accumulate, grad_checkpoint=checkpoint, batch=BATCH)
        print(f"{row} {gb:.2f} GB, {time.perf_counter() - began:.1f} s", flush=True)
        work = dict(tflop=live.flop / share / 1e12, traffic_gb=live.traffic / share / 1e9)
        yield {
            k: round(v, 3) if isinstance(v, float) else v
            for k, v in (row | dict(gb=gb, held_gb=held / 1e9) | work).items()
        }


def usable_gb(card):
    "GB that a step may take on a card: a tenth of the card and 0.8 GB of the CUDA context are left free"
    return 0.9 * card - 0.8


def counted_rows():
    "The stored rows"
    return json.loads((RESULTS / "small_cards.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--quick", action="store_true", help="one row, nothing stored")
    args = parser.parse_args()
    if args.quick:
        live, held = counted_step(create_backbone(NETWORKS[1], None, SIZE), "bf16", PARTS[-1])
        return print(f"{live.peak} bytes, {held} before the step, {live.flop} FLOP, {live.traffic} bytes moved")
    for network in args.networks:
        rows = list(count(network))
        store("small_cards", ("network",), rows)  # in place of all rows of that network


if __name__ == "__main__":
    main()
