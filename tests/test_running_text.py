"""Unlabelled text as tasks: where it is cut, WikiText's spaces, and parts that share no document."""

import gzip
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm_fast.search.running_text import text_rows
from drllm_fast.search.tasks import load_rows, load_task, part_of

WIKITEXT = """\
 = Ice Age =

 The ice @-@ sheet weighed 6 @.@ 5 million tons ( about 1 @,@ 000 ships ) , it 's said ; " no one knows " .
 = = = Sources [ 1 ] = = =

 Ann isn 't here : they 've left !
""".replace(" =\n", " = \n").replace(" .\n", " . \n")


def numbered(start, count):
    return " ".join(f"w{i}" for i in range(start, start + count))


def book(folder, documents, name="book.txt", between="\n\n"):
    file = folder / name
    file.write_text(between.join(documents), encoding="utf-8")
    return file


def words(row):
    return row["question"].split(), row["choices"][0].split()


# -- where it is cut
@pytest.mark.parametrize("count", [39, 40, 41, 100, 500])
def test_contexts_and_what_follows_them(tmp_path, count):
    file = book(tmp_path, [numbered(0, count), numbered(1000, 60)])
    rows = [row for row in text_rows(f"text:{file}") if row["document"] == "0"]
    assert bool(rows) == (count >= 40)
    read = []
    for row in rows:
        context, continuation = words(row)
        assert 8 <= len(context) <= 96 and len(continuation) == 32
        read += context + continuation
    assert read == numbered(0, len(read)).split() and count - len(read) < 40


def test_the_rows(tmp_path):
    rows = text_rows(f"text:{book(tmp_path, [numbered(0, 300), numbered(1000, 50)])}")
    assert len({row["id"] for row in rows}) == len(rows) > 3
    assert [row["document"] for row in rows] == ["0"] * (len(rows) - 1) + ["1"]
    assert all(
        (row["task"], row["form"], row["answer"], len(row["choices"])) == ("text", "verbatim", 0, 1) for row in rows
    )
    lengths = [
        len(words(row)[0]) for seed in range(40) for row in text_rows(f"text:{tmp_path / 'book.txt'}", seed=seed)
    ]
    assert min(lengths) == 8 and max(lengths) > 90  # all lengths in between may come


def test_the_seed_decides_and_nothing_else(tmp_path):
    file = book(tmp_path, [numbered(0, 300), numbered(1000, 300)])
    assert text_rows(f"text:{file}", seed=1) == text_rows(f"text:{file}", seed=1) != text_rows(f"text:{file}", seed=2)
    # What stands before a document moves its rows' ids, not what stands behind it.
    longer = book(tmp_path, [numbered(0, 300), numbered(1000, 300), numbered(2000, 90)], "longer.txt")
    assert text_rows(f"text:{longer}")[: len(text_rows(f"text:{file}"))] == text_rows(f"text:{file}")


def test_paragraphs_of_a_document_are_cut_apart(tmp_path):
    file = book(tmp_path, [numbered(0, 45), numbered(100, 45)], between="\n")
    rows = text_rows(f"text:{file}")
    assert [row["document"] for row in rows] == ["0", "0"] and [row["id"] for row in rows] == ["0/0", "0/1"]
    assert words(rows[0])[0][0] == "w0" and words(rows[1])[0][0] == "w100"


def test_sentences(tmp_path):
    text = (
        'One day it rained hard. "No sun today at all," said Ann. Was it so? Too short. It never ends\n'
        f"Now {numbered(0, 22)} end. Now {numbered(0, 23)} end. The <unk> was here today. Four words it has."
    )
    rows = text_rows(f"sentences:{book(tmp_path, [text])}")
    found = [row["choices"][0] for row in rows]
    assert found == [
        "One day it rained hard.", '"No sun today at all," said Ann.', f"Now {numbered(0, 22)} end.",
        "Four words it has.",
    ]  # fmt: skip
    assert {row["question"] for row in rows} == {""} and {row["task"] for row in rows} == {"sentences"}


def test_items(tmp_path):
    file = book(tmp_path, [numbered(0, 300)])
    rows, items = text_rows(f"text:{file}"), load_task(f"text:{file}")
    assert [(item.prompt, item.choices, item.answer) for item in items] == [
        (row["question"], (" " + row["choices"][0],), 0) for row in rows
    ]
    assert [item.prompt for item in load_task(f"text:{file}", limit=2)] == [row["question"] for row in rows[:2]]
    sentences = load_task(f"sentences:{book(tmp_path, ['This is a sentence.'])}")
    assert [(item.prompt, item.choices) for item in sentences] == [("", (" This is a sentence.",))]


# -- WikiText
def test_articles_are_documents(tmp_path):
    article = f" = Title {{}} = \n\n {numbered(0, 50)} \n = = Part = = \n\n {numbered(50, 50)} \n"
    file = book(tmp_path, [article.format(n) for n in range(3)], between="")
    rows = text_rows(f"text:{file}")
    assert {row["document"] for row in rows} == {"0", "1", "2"}
    assert all("=" not in row["question"] + row["choices"][0] for row in rows)
    by_document = [[word for row in rows if row["document"] == d for word in words(row)[0]] for d in "012"]
    assert all(document[0] == "w0" and "w50" in document for document in by_document)


def test_wikitext_is_joined_as_lm_eval_joins_it(tmp_path):
    """But for what it leaves apart: a mark at the end of a line, and some short forms."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    body = "\n".join(line for line in WIKITEXT.splitlines() if "=" not in line)
    expected = re.sub(r" ([.!])", r"\1", wikitext_detokenizer({"page": body})).replace(" 've", "'ve").split()
    assert expected[:4] == ["The", "ice-sheet", "weighed", "6.5"] and "isn't" in expected and "they've" in expected
    filler = numbered(0, 60)
    file = book(tmp_path, [WIKITEXT.replace(" . \n", f" . {filler} \n").replace("left !", f"left ! {filler}")])
    found = {}
    for row in text_rows(f"text:{file}"):
        context, continuation = words(row)
        found[row["id"]] = context + continuation
    first, second = found["0/0"], next(f for f in found.values() if f[0] == "Ann")
    end = expected.index("Ann")
    assert first[:end] == expected[:end] and second[: len(expected) - end] == expected[end:]


def test_other_text_is_left_as_it_is(tmp_path):
    odd = 'she said " so " , ( and ) 5 @.@ 5 , isn \'t = it = ' + numbered(0, 40)
    (row,) = text_rows(f"text:{book(tmp_path, [odd])}")
    assert odd.startswith(row["question"])


# -- parts
def test_parts_share_no_document(tmp_path):
    file = book(tmp_path, [numbered(1000 * n, 200) for n in range(60)])
    whole = load_rows(f"text:{file}")
    train, validation = (load_rows(f"text:{file}:{part}") for part in ("train", "validation"))
    assert sorted(row["id"] for row in train + validation) == sorted(row["id"] for row in whole)
    assert not {row["document"] for row in train} & {row["document"] for row in validation}
    assert 0.15 < len(validation) / len(whole) < 0.5
    assert [part_of(row) for row in validation] == ["validation"] * len(validation)
    assert [item.id for item in load_task(f"text:{file}:validation")] == [row["id"] for row in validation]


@pytest.mark.parametrize("spec", ["quiz.jsonl", "synth_arith:1"])
def test_parts_of_other_tasks(tmp_path, spec):
    if spec.endswith("jsonl"):
        lines = [f'{{"id": "q{n}", "question": "{n}?", "choices": ["a", "b"], "answer": 0}}' for n in range(300)]
        (tmp_path / spec).write_text("\n".join(lines))
        spec = str(tmp_path / spec)
    whole, *parts = (load_rows(spec + part, seed=3) for part in ("", ":train", ":validation"))
    assert sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in whole)
    assert 0.2 < len(parts[1]) / len(whole) < 0.45
    assert load_rows(f"{spec}:train", seed=3) == parts[0]


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_part_is_of_the_document(id, document):
    assert part_of({"id": id, "document": document}) == part_of({"id": document}) in ("train", "validation")


def test_a_part_without_rows(tmp_path):
    file = book(tmp_path, [numbered(0, 45)])
    empty = next(part for part in ("train", "validation") if part != part_of({"id": "0"}))
    with pytest.raises(ValueError, match=f"has no rows in its part for {empty}; it is too short"):
        load_rows(f"text:{file}:{empty}")


# -- files
def test_compressed_files(tmp_path):
    file = book(tmp_path, [numbered(0, 300), "Ünï " + numbered(0, 60)])
    with gzip.open(tmp_path / "book.txt.gz", "wt", encoding="utf-8") as out:
        out.write(file.read_text(encoding="utf-8"))
    assert text_rows(f"text:{file}.gz") == text_rows(f"text:{file}")
    (tmp_path / "cut.txt.gz").write_bytes((tmp_path / "book.txt.gz").read_bytes()[:-20])
    (tmp_path / "none.txt.gz").write_bytes(file.read_bytes())
    for name in ("cut", "none"):
        with pytest.raises(OSError, match=f"{name}.txt.gz is damaged"):
            text_rows(f"text:{tmp_path / name}.txt.gz")


def test_refusals(tmp_path):
    file = book(tmp_path, ["too short to be cut"])
    with pytest.raises(ValueError, match="has no text to take: no paragraph is long enough"):
        text_rows(f"text:{file}")
    with pytest.raises(ValueError, match="has no sentences to take"):
        text_rows(f"sentences:{file}")
    with pytest.raises(OSError, match="there is no file"):
        text_rows(f"text:{tmp_path / 'nothing.txt'}")
    with pytest.raises(OSError, match="there is no file"):
        load_task(f"text:{tmp_path / 'nothing.txt'}:train")
    for spec in (f"words:{file}", f"text:{tmp_path / 'book.md'}", "text:", str(file)):
        with pytest.raises(ValueError, match="is not text:FILE or sentences:FILE"):
            text_rows(spec)
    (tmp_path / "latin.txt").write_bytes("Ünï".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        text_rows(f"text:{tmp_path / 'latin.txt'}")
