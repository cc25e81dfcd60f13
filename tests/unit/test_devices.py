import pytest
import torch

from serve.devices import best_device, claim_device
from serve.errors import OperatorError
from serve.settings import EncoderSettings


def test_an_absent_device_names_the_setting() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(OperatorError) as raised:
        claim_device("cuda", 0.0, "encoder.device")
    assert raised.value.param == "encoder.device"


def test_auto_takes_the_best_device() -> None:
    assert claim_device("auto", 0.0, "diffusion.device").type == best_device()


def test_an_encoder_without_a_share_of_a_gpu_stays_off_it() -> None:
    assert EncoderSettings().place == "cpu"
    assert EncoderSettings(num_gpus=0.25).place == "auto"
    assert EncoderSettings(device="cuda").place == "cuda"
