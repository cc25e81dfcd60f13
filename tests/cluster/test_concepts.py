"""Learned concepts on a running server: a file comes, and prompts may use it."""

from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.orders import difference, finished, picture, submit
from support.server import Server, wait_until
from transformers import CLIPTokenizer

from serve.shapes import WEIGHTS

pytestmark = pytest.mark.cluster


def put(server: Server, name: str, **tensors: torch.Tensor) -> None:
    folder = server.data_dir / "concepts"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / ".new")
    (folder / ".new").rename(folder / name)


def known(http: httpx.Client, name: str) -> bool:
    answer = http.post("/v1/embeddings", json={"prompt": f"a <{name}>", "output": "report"})
    return answer.status_code == 200 or name not in answer.json()["error"]["message"]


def refusal(http: httpx.Client, prompt: str) -> str:
    answer = http.post("/v1/jobs", json={"prompt": prompt})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == "prompt"
    return str(answer.json()["error"]["message"])


def own_vectors(word: str) -> torch.Tensor:
    """The shipped model's vector of a word."""
    (file,) = Path(WEIGHTS / "text_encoder").glob("*.safetensors")
    table = next(tensor for name, tensor in load_file(file).items() if name.endswith("token_embedding.weight"))
    (token,) = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")(word, add_special_tokens=False).input_ids
    return table[[token]].clone()


def test_a_new_concept_is_drawn_without_a_restart(server: Server, http: httpx.Client) -> None:
    """One that has a word's own vector draws the word's picture, to the pixel."""
    assert "zorb" in refusal(http, "a <zorb> circle on a blue background")
    put(server, "zorb.safetensors", emb_params=own_vectors("red"))
    wait_until(lambda: known(http, "zorb"), 10, "the concept to be found")
    words, concept = (
        finished(http, submit(http, f"a {word} circle on a blue background", seed=3)) for word in ("red", "<zorb>")
    )
    assert concept["cache"]["encoded"] + concept["cache"]["redis"] + concept["cache"]["memory"] >= 1
    assert difference(picture(http, words), picture(http, concept)) == 0


def test_what_can_not_be_used_is_told_where_it_stands(server: Server, http: httpx.Client) -> None:
    put(server, "wide.safetensors", emb_params=torch.ones(2, 768))
    put(server, "bad.safetensors", emb_params=torch.full((1, 128), float("nan")))
    put(server, "old.pt", emb_params=torch.ones(1, 128))
    wait_until(lambda: "pickled" in refusal(http, "an <old> circle"), 10, "the files to be found")
    assert "768 wide" in refusal(http, "a <wide> circle")
    assert "128" in refusal(http, "a <wide> circle")
    assert "no numbers" in refusal(http, "a <bad> circle")
    assert "<old>" in refusal(http, "an <old> circle")
