"""Data: every kind of source, recognised columns, labels matched by name, and what is said where there is nothing."""

from __future__ import annotations

import csv
import io
import json
import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from surgery.adapters import adapter_for, digits, load_data, load_model
from surgery.adapters.columns import find_columns
from surgery.adapters.images import to_pil
from surgery.adapters.labels import Labels, read_labels
from surgery.calling import as_batch
from surgery.errors import DataError

datasets = pytest.importorskip("datasets", reason="reading data needs the extra `data`")

SHARED = Path(__file__).resolve().parents[2] / "shared"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data and weights of ../shared")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "a"]
TIMM = "timm:resnet10t?pretrained=false&num_classes=3&input_size=32&mean=0&std=1&crop_pct=1.0"


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def save_tokenizer(path, **options):
    """A tokenizer of nine words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **options,
    ).save_pretrained(path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A tiny classifier of text."""
    path = tmp_path_factory.mktemp("reader")
    save_tokenizer(path, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        id2label={0: "Negative", 1: "Positive"},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return load_model(str(path))


@pytest.fixture(scope="module")
def viewer():
    return load_model(TIMM)


def colour(index):
    return to_pil(torch.full((3, 40, 40), 0.0).index_fill(0, torch.tensor(index), 1.0))


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return str(path)


TEXTS = [{"text": "good film", "label": 1}, {"text": "a very bad film", "label": 0}, {"text": "good", "label": 1}]


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_text_files(tmp_path, reader, suffix):
    loader = load_data(write_rows(tmp_path / f"reviews{suffix}", TEXTS), reader, batch_size=2)
    first, second = loader
    assert first["input_ids"].tolist() == [[2, 4, 6, 3, 0, 0], [2, 8, 7, 5, 6, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert first["labels"].tolist() == [1, 0]
    assert second["input_ids"].tolist() == [[2, 4, 3]]
    assert (len(loader), loader.samples) == (2, 3)
    batch = as_batch(first)
    reader.model(**batch.kwargs)
    example = adapter_for(reader.model).example(reader.model)
    assert example.kwargs.keys() == batch.kwargs.keys()  # what is probed is what is called later
    assert (example.kwargs["input_ids"][:, 0] == 2).all()  # [CLS], known from the tokenizer alone


def test_pairs_of_texts(tmp_path, reader):
    rows = [{"idx": 7, "premise": "a film", "hypothesis": "good", "label": 1}]
    (batch,) = load_data(write_rows(tmp_path / "pairs.jsonl", rows), reader)
    assert batch["input_ids"].tolist() == [[2, 8, 6, 3, 4, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_long_texts_are_cut_to_what_the_model_reads(tmp_path, reader):
    (batch,) = load_data(write_rows(tmp_path / "long.jsonl", [{"text": "good " * 50, "label": 0}]), reader)
    assert batch["input_ids"].shape == (1, 12)


def test_text_without_labels(tmp_path, reader):
    (batch,) = load_data(write_rows(tmp_path / "stories.jsonl", [{"story": "a film"}]), reader)
    assert "labels" not in batch


def test_labels_that_the_data_set_hides_are_left_out(tmp_path, reader):
    rows = [{"text": "good", "label": -1}, {"text": "bad", "label": -1}]
    (batch,) = load_data(write_rows(tmp_path / "hidden.jsonl", rows), reader)
    assert "labels" not in batch


def test_labels_are_matched_by_name(tmp_path, reader):
    rows = [{"text": "good", "label": "positive"}, {"text": "bad", "label": "NEGATIVE"}]
    (batch,) = load_data(write_rows(tmp_path / "named.csv", rows), reader)
    assert batch["labels"].tolist() == [1, 0]

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["positive", "negative"])
    )
    table = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features)
    table.to_parquet(tmp_path / "swapped.parquet")
    (batch,) = load_data(str(tmp_path / "swapped.parquet"), reader)
    assert batch["labels"].tolist() == [1, 0]  # the model's numbers, not the data set's


def test_numbers_stay_numbers(tmp_path, reader):
    (batch,) = load_data(write_rows(tmp_path / "scores.jsonl", [{"text": "good", "score": 0.25}]), reader)
    assert batch["labels"].dtype is torch.float32


def test_labels_outside_the_models_classes(tmp_path, reader):
    path = write_rows(tmp_path / "many.jsonl", [{"text": "good", "label": 5}])
    with pytest.raises(DataError, match="column 'label': row 0 has label 5, the model has classes 0 to 1"):
        list(load_data(path, reader))
    rows = [{"text": "good", "label": name} for name in ("x", "y", "z")]
    with pytest.raises(DataError, match=r"3 different labels \(x, y, z, …\), the model has 2 classes"):
        load_data(write_rows(tmp_path / "strange.jsonl", rows), reader)
    rows = [{"text": "good", "label": 1}, {"text": "good", "label": None}]
    with pytest.raises(DataError, match="row 1 has no label"):
        list(load_data(write_rows(tmp_path / "holes.jsonl", rows), reader))


@pytest.mark.parametrize("order", [None, (1, 0, 2)])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_wrong_label_becomes_no_other_class(order, wrong):
    labels = Labels("label", order=order, classes=3)
    with pytest.raises(DataError, match=rf"column 'label': row 9 has label {wrong}, the .* has classes 0 to 2"):
        labels.read([0, 1, wrong, wrong], [4, 0, 9, 5])
    assert labels.read([-1, -1], [0, 1]) is None


def test_rows_are_those_of_the_file_in_mixed_data(tmp_path, reader):
    rows = [{"text": "good", "label": 0} for _ in range(20)]
    for wrong, message in ((None, "row 7 has no label"), (5, "row 7 has label 5")):
        rows[7]["label"] = wrong
        with pytest.raises(DataError, match=message):
            list(load_data(write_rows(tmp_path / f"{wrong}.jsonl", rows), reader, batch_size=4, shuffle=True, seed=1))


def test_class_names_that_differ_are_said(caplog):
    read_labels("label", datasets.ClassLabel(names=["x", "y", "z"]), (), ("a", "b"), 2)
    assert "under other names" in caplog.text


def test_as_many_classes_of_other_names_are_said(caplog):
    labels = read_labels("label", datasets.ClassLabel(names=["pos", "neg"]), (), ("negative", "positive"), 2)
    assert "its classes (pos, neg) are not named like the model's (negative, positive)" in caplog.text
    assert labels.order is None  # by number all the same


@pytest.mark.parametrize(
    ("names", "own"), [(["0", "1"], ("a", "b")), (["a", "b"], ("LABEL_0", "LABEL_1")), (["b", "a"], ("A", "B"))]
)
def test_numbered_or_equal_classes_are_no_reason_to_warn(names, own, caplog):
    read_labels("label", datasets.ClassLabel(names=names), (), own, 2)
    assert caplog.text == ""


def test_folders_named_by_synset_are_matched_with_imagenet():
    names = load_model("timm:resnet10t?pretrained=false").label_names
    labels = read_labels("label", datasets.ClassLabel(names=["n01440764", "n02102040"]), (), names, 1000)
    assert labels.read([0, 1, 1], range(3)).tolist() == [0, 217, 217]


def test_columns_can_be_named(tmp_path, reader):
    rows = [{"left": "good", "right": "bad", "text": "a", "stars": 1, "label": 0}]
    path = write_rows(tmp_path / "odd.jsonl", rows)
    (batch,) = load_data(path, reader, columns={"text": "right", "label": "stars"})
    assert batch["input_ids"].tolist() == [[2, 5, 3]]
    assert batch["labels"].tolist() == [1]
    with pytest.raises(DataError, match=r"has no column 'middle'.*found: left"):
        load_data(path, reader, columns={"text": "middle"})
    with pytest.raises(DataError, match="unknown role 'words'"):
        load_data(path, reader, columns={"words": "left"})


def test_texts_of_like_length_share_a_batch(tmp_path, reader):
    lengths = torch.randint(1, 7, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    path = write_rows(tmp_path / "a.jsonl", [{"text": " ".join(["good"] * n), "label": n % 2} for n in lengths])

    def words(**options):
        loader = load_data(path, reader, batch_size=4, shuffle=True, **options)
        assert [batch["labels"].tolist() for batch in loader] == [
            [label % 2 for label in (batch["attention_mask"].sum(1) - 2).tolist()] for batch in loader
        ]
        return [(batch["attention_mask"].sum(1) - 2).tolist() for batch in loader]

    def padding(batches):
        return sum(max(batch) - one for batch in batches for one in batch)

    mixed, grouped = words(), words(group_by_length=True)
    assert sorted(chain(*grouped)) == sorted(chain(*mixed)) == sorted(lengths)
    assert [len(batch) for batch in grouped] == [4] * 12 + [2]
    assert 3 * padding(grouped) < padding(mixed)
    longest = [max(batch) for batch in grouped[:-1]]
    assert longest not in (
        sorted(longest),
        sorted(longest, reverse=True),
    )  # every fifth batch is held out: of any length
    assert grouped == words(group_by_length=True) != words(group_by_length=True, seed=1)
    assert len(list(chain(*words(group_by_length=True, limit=7)))) == 7


def test_language_models_get_padding_on_the_right(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    save_tokenizer(tmp_path / "lm", padding_side="left")
    loaded = load_model(str(tmp_path / "lm"))
    (batch,) = load_data(write_rows(tmp_path / "a.jsonl", [{"text": "good"}, {"text": "a film"}]), loaded)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert loaded.tokenizer.padding_side == "left"  # for `generate`, as it was


def test_decoders_read_the_target_shifted(tmp_path):
    config = transformers.T5Config(
        vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=8, pad_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    loaded = load_model(str(tmp_path / "t5"))
    rows = [{"document": "a film", "summary": "good film"}, {"document": "bad", "summary": "bad"}]
    (batch,) = load_data(write_rows(tmp_path / "a.jsonl", rows), loaded)
    assert batch["decoder_input_ids"].tolist() == [[8, 2, 4, 6], [8, 2, 5, 0]]
    (alone,) = load_data(str(tmp_path / "a.jsonl"), loaded, columns={"text": "document", "target": "document"})
    assert alone["decoder_input_ids"].tolist() == [[8, 2, 8, 6], [8, 2, 5, 0]]
    loaded.model(**as_batch(batch).kwargs)


def test_a_model_of_text_needs_text(tmp_path, reader):
    path = write_rows(tmp_path / "numbers.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(
        DataError, match=r"found no column of text; columns: a \(int64\), b \(int64\); call the right one text"
    ):
        load_data(path, reader)
    two = write_rows(tmp_path / "two.jsonl", [{"p": "x", "q": "y"}])
    with pytest.raises(DataError, match="found no column of text"):
        load_data(two, reader)


def test_a_missing_text_is_an_error_with_its_row(tmp_path, reader):
    path = write_rows(tmp_path / "gaps.jsonl", [{"text": "good", "label": 0}, {"text": None, "label": 0}])
    with pytest.raises(DataError, match="row 1: column 'text' is empty"):
        list(load_data(path, reader))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_an_empty_first_cell_hides_no_column(tmp_path, reader, suffix):
    rows = [{"text": None, "label": "positive"}, {"text": "good", "label": None}, {"text": "bad", "label": "negative"}]
    loader = load_data(write_rows(tmp_path / f"gaps{suffix}", rows), reader)
    assert loader.columns == {"text": "text", "label": "label"}
    with pytest.raises(DataError, match="row 0: column 'text' is empty"):
        list(loader)
    loader = load_data(write_rows(tmp_path / f"holes{suffix}", [rows[1], rows[0], rows[2]]), reader)
    assert loader.labels.index == {"negative": 0, "positive": 1}


def test_targets_are_for_models_that_write():
    row = {"article": "a long text", "highlights": "short"}
    assert find_columns(dict.fromkeys(row), row, ("text",), target=True) == {"text": "article", "target": "highlights"}
    assert find_columns(dict.fromkeys(row), row, ("text",)) == {"text": "article"}


# ---------------------------------------------------------------- pictures


def test_a_column_of_encoded_pictures(tmp_path, viewer):
    rows = [{"picture": png(colour(i)), "fine_label": i} for i in (0, 2)]
    inputs, labels = next(iter(load_data(write_rows(tmp_path / "a.parquet", rows), viewer)))
    assert inputs.shape == (2, 3, 32, 32)
    assert inputs.mean((2, 3)).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert labels.tolist() == [0, 2]
    assert as_batch((inputs, labels)).labels is labels


def test_records_and_typed_pictures(tmp_path, viewer):
    records = [{"img": {"bytes": png(colour(1)), "path": None}, "label": 1}]
    (first,) = load_data(write_rows(tmp_path / "records.parquet", records), viewer)
    table = datasets.Dataset.from_list(records).cast_column("img", datasets.Image())
    table.to_parquet(tmp_path / "typed.parquet")
    (second,) = load_data(str(tmp_path / "typed.parquet"), viewer)
    assert torch.equal(first[0], second[0])
    assert first[0][0, 1].min() == 1


def test_pictures_without_labels_come_alone(tmp_path, viewer):
    (batch,) = load_data(write_rows(tmp_path / "a.parquet", [{"image": png(colour(0))}]), viewer)
    assert isinstance(batch, torch.Tensor)


@pytest.fixture
def folders(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for index, name in enumerate(("cat", "dog")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                colour(index).save(place / f"{number}.png")
    return tmp_path


def test_folders_of_pictures(folders, viewer):
    train = list(load_data(str(folders), viewer, batch_size=4))
    assert [len(labels) for _, labels in train] == [4, 2]
    inputs, labels = next(iter(load_data(str(folders), viewer, split="test")))
    assert labels.tolist() == [0, 1]
    assert inputs[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0]]
    (one,) = load_data(str(folders / "test"), viewer)
    assert torch.equal(one[0], inputs)
    with pytest.raises(DataError, match="has no split 'validation'; found: test, train"):
        load_data(str(folders), viewer, split="validation")


def test_a_split_without_a_class_is_numbered_like_the_others(folders, viewer):
    (folders / "train" / "bird").mkdir()
    colour(2).save(folders / "train" / "bird" / "0.png")
    (folders / "train" / ".cache").mkdir()
    test = load_data(str(folders), viewer, split="test")
    assert test.column("label") == [1, 2] and next(iter(test))[1].tolist() == [1, 2]
    assert load_data(str(folders), viewer).column("label") == [0, 1, 1, 1, 2, 2, 2]


def test_names_of_classes_that_a_model_has_none_of_are_numbered_aloud(caplog):
    labels = read_labels("label", None, ["pos", "neg"], (), None)
    assert labels.index == {"neg": 0, "pos": 1}
    assert "neg, pos are no numbers, and the model names no classes; numbered in alphabetical order" in caplog.text


def test_folders_without_splits_say_that_all_is_read(folders, viewer, caplog):
    for own in (folders, folders / "test"):
        assert load_data(str(own), viewer, split="test").samples == 2
    assert load_data(str(folders / "train"), viewer).samples == 6
    assert "splits" not in caplog.text
    assert load_data(str(folders / "train"), viewer, split="test").samples == 6
    assert "train has no splits: all 6 rows are read as the split 'test'" in caplog.text


def test_files_say_that_all_of_them_is_read(tmp_path, reader, caplog):
    for name in ("test.csv", "sst2_test.csv", "reviews.csv"):
        write_rows(tmp_path / name, TEXTS)
    load_data(str(tmp_path / "reviews.csv"), reader)
    load_data(str(tmp_path / "test.csv"), reader, split="test")
    load_data(str(tmp_path / "sst2_test.csv"), reader, split="test")
    assert "splits" not in caplog.text
    load_data(str(tmp_path / "reviews.csv"), reader, split="test")
    assert "reviews.csv has no splits: all 3 rows are read as the split 'test'" in caplog.text


def test_damaged_pictures_are_named_by_row(tmp_path, viewer):
    rows = [{"image": png(colour(0)), "label": 0}, {"image": png(colour(0))[:40], "label": 0}]
    path = write_rows(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match="row 1: an image cannot be decoded"):
        list(load_data(path, viewer))


def test_damaged_pictures_are_named_by_row_in_any_order(tmp_path, viewer):
    rows = [{"image": {"bytes": png(colour(0))[: 40 if i == 4 else None], "path": None}} for i in range(6)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "typed.parquet")
    for seed in range(3):
        with pytest.raises(DataError, match=r"^row 4 cannot be read: "):
            list(load_data(str(tmp_path / "typed.parquet"), viewer, batch_size=6, shuffle=True, seed=seed))


def test_huggingface_pictures(tmp_path):
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    path = write_rows(tmp_path / "a.parquet", [{"image": png(colour(2)), "label": 1}])
    bare = next(iter(load_data(path, load_model(f"{tmp_path / 'vit'}?mean=0&std=1"))))
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    loaded = load_model(f"{tmp_path / 'vit'}?mean=0&std=1")
    own = next(iter(load_data(path, loaded)))
    for batch in (bare, own):
        assert batch["pixel_values"].shape == (1, 3, 16, 16)
        torch.testing.assert_close(batch["pixel_values"].mean((2, 3)), torch.tensor([[0.0, 0.0, 1.0]]))
        assert batch["labels"].tolist() == [1]
    loaded.model(**as_batch(own).kwargs)


def test_augmentation_changes_pixels_and_keeps_rows(tmp_path, viewer):
    gradient = to_pil(torch.linspace(0, 1, 1600).view(1, 40, 40).expand(3, -1, -1))
    path = write_rows(tmp_path / "a.parquet", [{"image": png(gradient), "label": i} for i in range(3)])
    loader = load_data(path, viewer, augment=True)
    (one, labels), (two, again) = next(iter(loader)), next(iter(loader))
    assert torch.equal(labels, again)
    assert not torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert one.shape == two.shape == (3, 3, 32, 32)
    repeated, _ = next(iter(load_data(path, viewer, augment=True)))
    assert torch.equal(one, repeated)


def test_augmented_texts_are_spliced_anew_on_every_pass_and_have_no_labels(tmp_path, reader):
    words = ["good film", "bad film", "good plot", "bad plot"]
    rows = [{"text": " ".join(words[(i + k) % 4] for k in range(2 + i % 2)), "label": i % 2} for i in range(12)]
    path = write_rows(tmp_path / "a.parquet", rows)
    plain, loader = load_data(path, reader, batch_size=6), load_data(path, reader, batch_size=6, augment=True)
    passes = [[batch["input_ids"] for batch in loader] for _ in range(2)]
    assert all("labels" in batch for batch in plain) and not any("labels" in batch for batch in loader)
    whole = torch.cat([batch["input_ids"].flatten() for batch in plain])
    first, second = (torch.cat([ids.flatten() for ids in one]) for one in passes)
    assert not torch.equal(first, second) and not torch.equal(first, whole)
    again = load_data(path, reader, batch_size=6, augment=True)
    assert all(torch.equal(a["input_ids"], b) for a, b in zip(again, passes[0], strict=True))
    for batch in again:
        reader.model(**as_batch(batch).kwargs)


# ---------------------------------------------------------------- order


def test_order_is_fixed_and_limit_counts_rows(tmp_path, reader):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "good", "score": float(i)} for i in range(20)])

    def order(**options):
        loader = load_data(path, reader, batch_size=3, **options)
        passes = [torch.cat([batch["labels"] for batch in loader]).tolist() for _ in range(2)]
        assert passes[0] == passes[1]
        return passes[0]

    assert order() == list(range(20))
    assert order(limit=5) == [0, 1, 2, 3, 4]
    mixed = order(shuffle=True)
    assert mixed != sorted(mixed) == list(range(20))
    assert order(shuffle=True, limit=5) == mixed[:5]
    assert order(shuffle=True, seed=1) != mixed


@pytest.mark.parametrize("option", ["batch_size", "limit"])
def test_counts_are_checked(option, viewer):
    with pytest.raises(DataError, match=f"{option} must be at least 1, got 0"):
        load_data("digits", viewer, **{option: 0})


# ---------------------------------------------------------------- sources


def test_a_directory_with_one_file_per_split(tmp_path, reader):
    write_rows(tmp_path / "train.parquet", TEXTS)
    write_rows(tmp_path / "train_extra.parquet", TEXTS * 2)
    write_rows(tmp_path / "dev.parquet", TEXTS[:1])
    assert load_data(str(tmp_path), reader).samples == 3
    assert load_data(str(tmp_path), reader, split="train_extra").samples == 6
    assert load_data(str(tmp_path), reader, split="validation").samples == 1
    with pytest.raises(DataError, match=r"no split 'test'; found: dev\.parquet, train\.parquet, train_extra\.parquet"):
        load_data(str(tmp_path), reader, split="test")


def test_shards_are_read_together(tmp_path, reader):
    (tmp_path / "data").mkdir()
    for part in range(2):
        write_rows(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", TEXTS)
    assert load_data(str(tmp_path), reader).samples == 6


def test_what_is_no_source(tmp_path, reader):
    write_rows(tmp_path / "reviews.csv", TEXTS)
    with pytest.raises(DataError, match=r"does not exist; did you mean .*reviews\.csv"):
        load_data(str(tmp_path / "review.csv"), reader)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"cannot read \.txt; a source is a Hugging Face dataset"):
        load_data(str(tmp_path / "notes.txt"), reader)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv is empty"):
        load_data(str(tmp_path / "empty.csv"), reader)
    (tmp_path / "head.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"head\.csv .*(has no rows|cannot be read)"):
        load_data(str(tmp_path / "head.csv"), reader)
    table = datasets.Dataset.from_list(TEXTS).data.table
    pytest.importorskip("pyarrow.parquet").write_table(table.slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet has no rows"):
        load_data(str(tmp_path / "none.parquet"), reader)
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"broken\.parquet cannot be read"):
        load_data(str(tmp_path / "broken.parquet"), reader)
    (tmp_path / "semicolons.csv").write_text("text;label\na good film;1\n")
    with pytest.raises(DataError, match=r"its only column is 'text;label'; columns are separated by commas"):
        load_data(str(tmp_path / "semicolons.csv"), reader)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match="neither data files nor folders of images; found: nothing"):
        load_data(str(tmp_path / "hollow"), reader)


def test_what_cannot_be_read_is_said_once(tmp_path, reader, caplog):
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    log, before = logging.getLogger("datasets"), datasets.logging.get_verbosity()
    log.addHandler(caplog.handler)
    try:
        with pytest.raises(DataError, match=r"latin\.csv cannot be read: 'utf-8' codec"):
            load_data(str(tmp_path / "latin.csv"), reader)
    finally:
        log.removeHandler(caplog.handler)
    assert not caplog.records and datasets.logging.get_verbosity() == before


# ---------------------------------------------------------------- digits and networks of the user's own


def test_digits():
    pytest.importorskip("sklearn", reason="digits come with scikit-learn")
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert (train.shape, test.shape) == ((1297, 1, 8, 8), (500, 1, 8, 8))
    assert float(train.min()) == 0.0
    assert float(train.max()) == 1.0
    assert set(torch.bincount(test_labels).tolist()) <= {48, 49, 50, 51, 52}
    assert torch.equal(digits("test")[0], test)
    pixels = torch.cat([train, test]).flatten(1)
    assert len(torch.unique(pixels, dim=0)) == 1797  # no digit is in both
    assert digits("test", size=16)[0].shape == (500, 1, 16, 16)
    assert len(train_labels) == 1297
    with pytest.raises(DataError, match="splits train and test, got 'validation'"):
        digits("validation")


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def net(classes=10): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))\n"
        "def both(): return net(), lambda x: torch.as_tensor(len(x) if isinstance(x, str) else x).float().flatten()\n"
        "def same(): return net(), lambda x: x\n"
        "def named(): return net(), lambda x: {'x': x}\n"
        "def conv(): return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))\n"
        "def to_tensor(x): return torch.tensor(list(x.tobytes())).view(*x.size, -1).permute(2, 0, 1) / 255\n"
        "def seen(): return conv(), to_tensor\n"
        "def check(x):\n"
        "    assert x.mode == 'RGB', x.mode\n"
        "    return to_tensor(x)\n"
        "def strict(): return conv(), check\n"
    )
    return f"python:{tmp_path / 'own.py'}"


def test_digits_for_every_kind_of_model(own):
    inputs, labels = next(iter(load_data("digits", load_model(f"{own}:net"), split="test")))
    assert torch.equal(inputs, digits("test")[0][:32])
    assert torch.equal(labels, digits("test")[1][:32])
    inputs, _ = next(iter(load_data("digits:16", load_model(f"{own}:net?mean=0.5&std=0.5&channels=3"))))
    assert inputs.shape == (32, 3, 16, 16)
    torch.testing.assert_close(inputs[:, 0], (digits("train", size=16)[0][:32, 0] - 0.5) / 0.5)
    viewer = load_model("timm:resnet10t?pretrained=false&num_classes=10&input_size=32")
    assert next(iter(load_data("digits", viewer)))[0].shape == (32, 3, 32, 32)
    with pytest.raises(DataError, match="expected digits or digits:<size>, got 'big'"):
        load_data("digits:big", viewer)


def test_a_users_own_preprocessing(own, tmp_path):
    loaded = load_model(f"{own}:both")
    (batch,) = load_data(write_rows(tmp_path / "t.jsonl", TEXTS), loaded)
    assert batch[0].tolist() == [[9.0], [15.0], [4.0]]
    (batch,) = load_data(write_rows(tmp_path / "v.jsonl", [{"x": [[1, 2], [3, 4]], "y": 1}]), loaded)
    assert batch[0].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(DataError, match="row 0: found text in the data, and a network of your own has no tokenizer"):
        list(load_data(str(tmp_path / "t.jsonl"), load_model(f"{own}:net")))


def test_texts_for_a_network_of_pictures(own, tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"review": "good film", "label": 1}])
    for name in ("same", "named"):
        with pytest.raises(
            DataError, match=r"row 0: preprocess was called with str and gave str; a tensor.* \(column 'review', str\)"
        ):
            list(load_data(path, load_model(f"{own}:{name}")))


def test_what_a_preprocess_raises_is_an_error_with_its_row(own, tmp_path):
    rows = [{"image": png(colour(0)), "label": 0}, {"image": png(colour(0).convert("L")), "label": 0}]
    path = write_rows(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"row 1: preprocessing failed: AssertionError: L \(column 'image', ") as caught:
        list(load_data(path, load_model(f"{own}:strict")))
    assert isinstance(caught.value.__cause__, AssertionError)


@pytest.mark.parametrize("name", ["conv", "seen"])
def test_pictures_become_colours_where_the_network_takes_them(own, tmp_path, name):
    pictures = [colour(0), colour(0).convert("RGBA"), colour(0).convert("P")]
    pictures += [colour(0).convert("L")] if name == "conv" else []
    loaded = load_model(f"{own}:{name}")
    ((batch, _),) = load_data(
        write_rows(tmp_path / "a.parquet", [{"image": png(p), "label": 0} for p in pictures]), loaded
    )
    assert batch.shape == (len(pictures), 3, 40, 40)
    assert torch.equal(batch[1], batch[0]) and torch.equal(batch[2], batch[0])
    loaded.model(batch)


def test_grey_and_coloured_pictures_need_channels(own, tmp_path):
    path = write_rows(
        tmp_path / "a.parquet", [{"image": png(p), "label": 0} for p in (colour(0), colour(0).convert("L"))]
    )
    with pytest.raises(DataError, match=r"different shapes: \(1, 40, 40\), \(3, 40, 40\); give \?channels="):
        list(load_data(path, load_model(f"{own}:net")))


def test_pictures_of_different_sizes_need_a_size(own, tmp_path):
    rows = [{"image": png(colour(0)), "label": 0}, {"image": png(colour(0).resize((8, 8))), "label": 0}]
    path = write_rows(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"different shapes: \(3, 8, 8\), \(3, 40, 40\); give \?size="):
        list(load_data(path, load_model(f"{own}:net")))
    (batch,) = load_data(path, load_model(f"{own}:net?size=16"))
    assert batch[0].shape == (2, 3, 16, 16)


# ---------------------------------------------------------------- real files


@shared
@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "model", "split", "samples", "classes"),
    [
        ("cifar10", "timm:resnet10t?pretrained=false&num_classes=10&input_size=32", "train", 15000, 10),
        ("imagenet", "timm:resnet10t?pretrained=false", "train_imagenette", 1500, 1000),
        ("sst2", "weights/minilm-sst2", "test", 872, 2),
        ("agnews", "weights/minilm-sst2?num_labels=4&ignore_mismatched_sizes=true", "test", 3000, 4),
        ("tinystories", "weights/stories260K", "test", 400, None),
    ],
)
def test_real_data(folder, model, split, samples, classes):
    loaded = load_model(model if model.startswith("timm:") else str(SHARED / model))
    loader = load_data(str(SHARED / "data" / folder), loaded, split=split, batch_size=4)
    assert loader.samples == samples
    batch = as_batch(next(iter(loader)))
    with torch.no_grad():
        loaded.model(*batch.args, **batch.kwargs)
    if classes is None:
        assert batch.labels is None
    else:
        assert batch.labels.shape == (4,)
        assert 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < classes


@shared
@pytest.mark.shared
def test_real_accuracy_of_text():
    loaded = load_model(str(SHARED / "weights" / "minilm-sst2"))
    right = total = 0
    for value in load_data(str(SHARED / "data" / "sst2"), loaded, split="test", limit=160):
        batch = as_batch(value)
        with torch.no_grad():
            right += int((loaded.model(**batch.kwargs).logits.argmax(-1) == batch.labels).sum())
        total += batch.size
    assert right / total > 0.85


@shared
@pytest.mark.shared
def test_real_accuracy_of_pictures():
    weights = SHARED / "weights" / "mobilenetv2_100_imagenet.safetensors"
    spec = f"timm:mobilenetv2_100?pad_type=same&mean=0.5&std=0.5&crop_pct=0.986&checkpoint={weights}"
    loaded = load_model(spec)
    right = total = 0
    for inputs, labels in load_data(str(SHARED / "data" / "imagenet"), loaded, split="test", limit=96):
        with torch.no_grad():
            right += int((loaded.model(inputs).argmax(-1) == labels).sum())
        total += len(labels)
    assert right / total > 0.7
