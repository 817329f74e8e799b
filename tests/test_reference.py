import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from squeeze import reference


def test_the_folder_is_a_checkpoint_of_the_stated_size():
    model = AutoModelForCausalLM.from_pretrained(reference.path())
    assert model.dtype == torch.bfloat16
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 15.7
    config = json.loads((reference.path() / "config.json").read_text())
    assert (model.config.num_hidden_layers, config["num_key_value_heads"]) == (8, 2)


def test_sequences_start_with_bos_and_digits_are_single_tokens():
    tokenizer = AutoTokenizer.from_pretrained(reference.path())
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == 0
    digits = tokenizer(" 1234567", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in digits] == [" ", *"1234567"]


def test_books_are_whole_records_by_authors_kept_out():
    books = reference.validation_books()
    assert len(books) == 12
    assert all(set(book) == {"title", "author", "text"} for book in books)
    assert {book["author"].split(",")[0] for book in books} == {"Austen", "Stoker", "Swift"}
    assert min(len(book["text"]) for book in books) > 100_000


def test_calibration_text_is_not_validation_text():
    books = "\n".join(book["text"] for book in reference.validation_books())
    passages = reference.calibration_passages()
    assert len(passages) == 40
    for passage in passages:
        middle = len(passage) // 2
        assert passage[middle : middle + 120] not in books
