"""Weights that come and go: what is where, and that nothing else changes."""

from collections.abc import Sequence

import pytest
import torch
from support.image_models import BUILDERS
from torch import nn

from serve.diffusion.families import open_family
from serve.diffusion.families.speed import blocks
from serve.diffusion.offload import ALIGNMENT, Offload, layers
from serve.models import check_folder
from serve.quantize import quantize
from serve.settings.pools import DiffusionSettings

CPU = torch.device("cpu")


class Chain(nn.Module):
    """Blocks in an order of its own, a buffer, and weights outside of all blocks. `broken` has one of them raise."""

    def __init__(self, order: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.order = order
        self.broken = False
        self.scale = nn.Parameter(torch.tensor([1.5]), requires_grad=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1 + 2 * n, padding=n))
            for n in range(4)
        )
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for n in self.order:
            x = self.blocks[n](x) * self.scale
            if self.broken and n == 2:
                raise torch.OutOfMemoryError("none left")
        return x


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def bytes_of(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(-(-each.numel() * each.element_size() // ALIGNMENT) * ALIGNMENT for each in tensors)


def inside(offload: Offload, module: nn.Module) -> bool:
    """Whether the module's weights lie in one of the slots."""
    starts = [(slot.buffer.data_ptr(), slot.buffer.data_ptr() + slot.buffer.numel()) for slot in offload._slots]
    return all(any(low <= each.data_ptr() < high for low, high in starts) for each in module.parameters())


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@torch.inference_mode()
def test_it_computes_the_same_and_holds_no_more_than_its_slots(
    x: torch.Tensor, ahead: bool, channels_last: bool
) -> None:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        chain = Chain().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        expected = chain(x)
        values = {name: each.clone() for name, each in chain.state_dict().items()}
        strides = {name: each.stride() for name, each in chain.named_parameters()}
        offload = Offload(chain, list(chain.blocks), CPU, ahead=ahead)
    assert offload.slot_bytes == (2 if ahead else 1) * max(bytes_of(block) for block in chain.blocks)
    for _ in range(3):
        assert torch.equal(chain(x), expected)
        assert sum(inside(offload, block) for block in chain.blocks) == len(offload._slots)
    assert not inside(offload, chain.blocks[1]), "two of four are gone again"
    assert {name: each.stride() for name, each in chain.named_parameters()} == strides
    offload.close()
    assert offload.slot_bytes == 0
    assert torch.equal(chain(x), expected)
    assert all(torch.equal(each, values[name]) for name, each in chain.state_dict().items())


@torch.inference_mode()
def test_the_next_block_is_there_before_its_turn_from_the_second_pass_on(x: torch.Tensor) -> None:
    """In the order that the model computes in, whatever the order of its lists."""
    with torch.inference_mode(False):
        chain = Chain(order=(2, 0, 3, 1))
        offload = Offload(chain, list(chain.blocks), CPU, ahead=True)
    seen: list[list[int]] = []
    for block in chain.blocks:
        block.register_forward_hook(lambda *_: seen.append([n for n in range(4) if inside(offload, chain.blocks[n])]))
    chain(x)
    assert seen == [[2], [0, 2], [0, 3], [1, 3]]
    seen.clear()
    chain(x)
    assert seen == [[0, 2], [0, 3], [1, 3], [1, 2]]


@torch.inference_mode()
def test_a_pass_that_fails_leaves_the_next_one_as_it_was(x: torch.Tensor) -> None:
    with torch.inference_mode(False):
        chain = Chain()
        expected = chain(x)
        offload = Offload(chain, list(chain.blocks), CPU, ahead=True)
    chain(x)
    chain.broken = True
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            chain(x)
    chain.broken = False
    for _ in range(2):
        assert torch.equal(chain(x), expected)
    assert len(offload._slots) == 2


@torch.inference_mode()
def test_what_two_blocks_share_stays_on_the_device(x: torch.Tensor) -> None:
    """The steps of 8-bit weights are one tensor in all layers."""
    with torch.inference_mode(False):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))).requires_grad_(False)
        quantize(list(model), 8, CPU)
        expected = model(x)
        steps = model[0][0].steps
        Offload(model, list(model), CPU, ahead=True)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert all(block[0].steps is steps for block in model)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_layers_of_a_denoiser_are_all_its_weights_but_loose_ones(tmp_path: object, family: str) -> None:
    """Sequential offloading leaves on the device what no layer owns, and that is next to nothing."""
    model = check_folder(BUILDERS[family](tmp_path / family), family)  # type: ignore[operator]
    denoiser = open_family(model, CPU, torch.float32, DiffusionSettings()).denoiser
    owned = {id(each) for layer in layers(denoiser) for each in layer.parameters()}
    loose = sum(each.numel() for each in denoiser.parameters() if id(each) not in owned)
    assert loose <= 0.001 * sum(each.numel() for each in denoiser.parameters())
    assert max(bytes_of(layer) for layer in layers(denoiser)) < max(bytes_of(block) for block in blocks(denoiser))
