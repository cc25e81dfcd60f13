import pytest

from serve.models import SHIPPED
from serve.prompts.tokenizers import PromptTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(SHIPPED)
