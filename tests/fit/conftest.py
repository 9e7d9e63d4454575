# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices are slower on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def searched(tiny_model, make_searched):
    """The searched adapter of the Llama that is `model`; 2 KV heads per latent group."""
    from vllm_mkv.adapter import Adapter

    return Adapter.load(make_searched(tiny_model("llama"), 2))


@pytest.fixture
def model(tiny_model):
    from vllm_mkv.fit.model import Source

    return Source(str(tiny_model("llama"))).load("float32", "cpu")
