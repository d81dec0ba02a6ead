"""A model for the examples to work on where there is no download."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat", "on", "a", "mat", "and", "slept"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A BERT of two layers with a tokenizer of twelve words."""
    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    shutil.copytree(GOLDEN / "bert_gelu", folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
