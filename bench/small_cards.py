"""GPU memory that a training step needs, counted without a GPU, for batches of 256 images of 256x128 and small cards.

python bench/small_cards.py                               every network, precision, accumulate and grad_checkpoint below
python bench/small_cards.py --networks ViT-B-16-quickgelu
python bench/small_cards.py --quick                       a smoke test: the smallest parts of one network, nothing stored

The step is that of `Stepper`: forward, loss against 750 clusters, backward and the optimiser, on fake tensors that have a size
and a device but no data. Every storage counts from its birth to its end, in blocks of 512 bytes like those of torch's CUDA
allocator; attention counts as the fused kernel that runs on CUDA. Not counted: the CUDA context, the work space of cuDNN and
cuBLAS, fragmentation, and batches that a loader prepares ahead. Results go to bench/results/small_cards.json.
"""

import argparse
import time
import weakref
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from measure import store
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pclclip_nb.backbones.create import create_backbone
from pclclip_nb.core.attention import set_grad_checkpoint
from pclclip_nb.memory_loss import contrastive_loss
from pclclip_nb.training.settings import TrainConfig, make_optimizer
from pclclip_nb.training.steps import Stepper

NETWORKS = ("ViT-B-16-quickgelu", "pass_vit_small", "resnet50")
SIZE, BATCH, CLUSTERS = (256, 128), 256, 750
PARTS = (1, 2, 4, 8, 16)
BLOCK = 512  # bytes, the smallest piece that torch's CUDA allocator gives out
KEY = ("network", "optimizer", "precision", "accumulate", "grad_checkpoint")


class LiveBytes(TorchDispatchMode):
    "Bytes of all storages on a device that are alive, and the most there were"

    def __init__(self, device="cuda"):
        super().__init__()
        self.device, self.now, self.peak, self._known = device, 0, 0, weakref.WeakKeyDictionary()

    def add(self, tensor):
        "Count the storage of a tensor, once, until it is freed"
        storage = tensor.untyped_storage()
        if tensor.device.type != self.device or storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[storage] = size
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


def fused_attention(q, k, v):
    "Attention as the fused kernels of CUDA compute it: nothing of size t x t is kept"
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextmanager
def fake_cuda():
    "Fake tensors on a card that torch takes for present, which multiplies bf16"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *a, **k: True))
        amp = torch.cuda.amp.common
        stack.enter_context(mock.patch.object(amp, "amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self: self))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", fused_attention))
        yield stack.enter_context(FakeTensorMode())


def move(net):
    "The network with tensors of equal sizes on the card"
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return net


class Clusters:
    "The loss of `ClusterMemory`, without its checks of the labels, which read them"

    def __init__(self, d):
        self.centroids = torch.empty(CLUSTERS, d, device="cuda")

    def loss(self, feats, labels):
        return contrastive_loss(feats, labels.to("cuda"), self.centroids)


def step_bytes(net, precision, accumulate=1, grad_checkpoint=False, batch=BATCH, optimizer="sgd"):
    "Most bytes alive in the second step of a batch, and before it"
    with fake_cuda():
        net = set_grad_checkpoint(move(net.train()), grad_checkpoint)
        step = Stepper(net, make_optimizer(net, None, cfg=TrainConfig(optimizer=optimizer)), None, precision, accumulate)
        memory, images = Clusters(net.d), torch.empty(batch, 3, *net.size, device="cuda")
        labels = torch.zeros(batch, dtype=torch.int64)
        with LiveBytes() as live:
            for tensor in [*net.state_dict(keep_vars=True).values(), images, memory.centroids]:
                live.add(tensor)
            for state in step.optimizer.state.values():
                for tensor in state.values():
                    live.add(tensor)
            held = live.now
            step(images, labels, memory)
            step(images, labels, memory)
        return live.peak, held
if __name__ == "__main__":
    import sys
    t=time.time(); net=create_backbone(sys.argv[1], None, SIZE); print('build', time.time()-t)
    for prec in ("fp32","bf16","fp16"):
      for acc,ck in ((1,False),(4,False),(1,True)):
        t=time.time(); r=step_bytes(net,prec,acc,ck and "vit" in sys.argv[1].lower()); print(prec,acc,ck,[x/1e9 for x in r], time.time()-t)
