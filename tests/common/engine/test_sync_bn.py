"""Synchronised batch norm: two processes with a part of the batch each are one with the whole."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d, SplitBatchNorm2d
from torch import nn

from common.engine.sync_bn import SyncBatchNorm, synchronise
from common.errors import ConfigError
from common.frames import FrameNorm

CPU = torch.device("cpu")
PARTS = (slice(0, 5), slice(5, 8))


class Net(nn.Module):
    """A norm of every kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 6, 3)
        self.frame = FrameNorm(6)
        self.plain = nn.BatchNorm3d(6, affine=False, momentum=None)
        self.act = BatchNormAct2d(6, act_layer=nn.SiLU)
        self.fc = nn.Linear(6, 5)
        self.last = nn.BatchNorm1d(5, momentum=0.3)

    def forward(self, x):
        x = self.plain(self.frame(self.conv(x)).relu() ** 2)
        return self.last(self.fc(self.act(x.amax(2)).mean((2, 3))))


def batches():
    generator = torch.Generator().manual_seed(1)
    return 3 + 2 * torch.randn(3, 8, 3, 4, 6, 6, generator=generator), torch.randn(8, 5, generator=generator)


def train(model, part=slice(0, 8)):
    """Three batches' ``part`` through the model; returns its outputs, and all gradients and buffers."""
    inputs, wanted = batches()
    outputs = []
    for batch in inputs:
        outputs.append(model(batch[part]))
        (outputs[-1] * wanted[part]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"outputs": torch.stack(outputs)}, gradients, dict(model.named_buffers())


def work(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1))
    torch.set_num_threads(1)
    with pytest.raises(ConfigError, match="does not go with train.compile"):
        synchronise(Net(), CPU, compiled=True)
    model = synchronise(Net(), CPU)
    assert sum(isinstance(module, SyncBatchNorm) for module in model.modules()) == 4
    assert list(model.state_dict()) == list(Net().state_dict())
    outputs, gradients, buffers = train(model, PARTS[rank])
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    torch.save([outputs, gradients, buffers, model.eval()(batches()[0][0])], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = Net()
    outputs, gradients, buffers = train(model)
    both = torch.cat([first[0]["outputs"], second[0]["outputs"]], 1)
    torch.testing.assert_close(both, outputs["outputs"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[1], gradients, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[2], buffers, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[3], model.eval()(batches()[0][0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[2:], second[2:], rtol=0, atol=0)


@pytest.mark.parametrize(
    "model, expected",
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "has no batch norm"),
        (nn.Sequential(SplitBatchNorm2d(4)), "cannot synchronise a SplitBatchNorm2d"),
    ],
)
def test_what_cannot_be_synchronised_is_an_error(model, expected):
    with pytest.raises(ConfigError, match=expected):
        synchronise(model, CPU)


def test_a_process_alone_needs_none():
    model = nn.Sequential(nn.BatchNorm2d(4))
    assert synchronise(model, CPU) is model
    assert type(model[0]) is nn.BatchNorm2d
