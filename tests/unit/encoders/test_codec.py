import pytest
import torch

from serve.encoders.codec import pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(77, 16).to(dtype)
    tensor[0, :3] = torch.tensor([float("inf"), -0.0, 1e-8]).to(dtype)
    back = unpack(pack(tensor))
    assert back.dtype is dtype
    assert torch.equal(back, tensor)
    assert pack(back) == pack(tensor)


def test_a_view_packs_as_its_own_values() -> None:
    batch = torch.randn(4, 77, 16)
    packed = pack(batch[2])
    assert torch.equal(unpack(packed), batch[2])
    assert len(packed) < 2 * 77 * 16 * 4
    assert torch.equal(unpack(pack(batch[1].T)), batch[1].T)
