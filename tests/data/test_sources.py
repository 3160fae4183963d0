"""Reading files and TFDS: what is read, and what every broken input is told."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from rlhf_jax.data import raw, sources
from rlhf_jax.data.sources import read, split_transcripts, stream

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data'


class MiniSourceSet(tfds.core.GeneratorBasedBuilder):
    """Four records of every kind of field that ``read`` must turn into plain Python."""

    VERSION = tfds.core.Version('1.0.0')
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name='one')]

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                'prompt': tfds.features.Text(),
                'gold': tfds.features.Scalar(np.float32),
                'tags': tfds.features.Sequence(tfds.features.Text()),
                'votes': tfds.features.Tensor(shape=(2,), dtype=np.int32),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(4):
            odd = {'tags': ['x', 'ü'], 'votes': [i, 7]}
            yield i, {'prompt': f'é{i}', 'gold': i / 2, **odd}


@pytest.fixture
def write(tmp_path):
    def write_bytes(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write_bytes


def lines(*records):
    return ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records).encode()


def fails(spec, *parts):
    with pytest.raises(ValueError) as caught:
        read(spec)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


def test_jsonl_gives_fields_and_places(write):
    data = b'\xef\xbb\xbf' + lines({'a': 'é'}) + b'\n  \n' + lines({'a': [1]})
    path = write('x.jsonl', data)
    records = read(f'jsonl:{path}')
    assert [r.fields for r in records] == [{'a': 'é'}, {'a': [1]}]
    assert [r.where for r in records] == [f'{path}:1', f'{path}:4']


def test_gz_reads_the_same(write):
    data = lines({'a': 1}, {'a': 2})
    plain, packed = write('x.jsonl', data), write('x.jsonl.gz', gzip.compress(data))
    fields = [[r.fields for r in read(f'jsonl:{p}')] for p in (plain, packed)]
    assert fields[0] == fields[1] == [{'a': 1}, {'a': 2}]


@pytest.mark.parametrize(
    'end, expected',
    [
        ('[:3]', [0, 1, 2]),
        ('[8:]', [8, 9]),
        ('[:25%]', [0, 1]),  # 2.5 records: rounded to even
        ('[90%:]', [9]),
        ('[20%:40%]', [2, 3]),
        ('[-2:]', [8, 9]),
        ('[:-80%]', [0, 1]),
        ('[:]', list(range(10))),
        ('', list(range(10))),
    ],
)
def test_slices(write, end, expected):
    path = write('x.jsonl', lines(*({'i': i} for i in range(10))))
    assert [r.fields['i'] for r in read(f'jsonl:{path}{end}')] == expected


def test_complementary_slices_share_nothing_and_lose_nothing(write):
    for size in (7, 10, 33):
        path = write('x.jsonl', lines(*({'i': i} for i in range(size))))
        halves = read(f'jsonl:{path}[:85%]') + read(f'jsonl:{path}[85%:]')
        assert [r.fields['i'] for r in halves] == list(range(size))


def test_bad_slices(write):
    path = write('x.jsonl', lines({'i': 0}, {'i': 1}))
    fails(f'jsonl:{path}[a:b]', 'malformed slice', '[:90%]')
    fails(f'jsonl:{path}[1]', 'malformed slice')
    fails(f'jsonl:{path}[:5]', 'asks for 5', 'there are 2 records', 'at most 2')
    fails(f'jsonl:{path}[:150%]', 'asks for 150%', 'at most 100%')
    fails(f'jsonl:{path}[1:1]', 'selects none of the 2 records')


def test_bad_specs(tmp_path):
    fails('josnl:x', "'josnl:x'", "did you mean 'jsonl'")
    fails('train.jsonl', 'kind:path')
    fails(f'jsonl:{tmp_path}/none.jsonl', 'none.jsonl', 'does not exist')
    fails(f'jsonl:{tmp_path}', 'is a directory')
    fails(f'parquet:{tmp_path}/none.parquet', 'none.parquet', 'is no file')
    fails(f'text:{tmp_path}', 'without .txt files')


def test_bad_jsonl(write):
    good = lines({'a': 1})
    path = write('x.jsonl', good + b'{"a": 1,}\n')
    fails(f'jsonl:{path}', f'{path}:2: not JSON', 'column', 'one whole JSON object')
    path = write('x.jsonl', good + good + b'[1, 2]\n')
    fails(f'jsonl:{path}', f'{path}:3: a list, not an object')
    path = write('x.jsonl', good + '{"a": "é"}\n'.encode('latin1'))
    fails(f'jsonl:{path}', f'{path}:2: byte 0xe9 is not UTF-8', 'iconv')
    fails(f'jsonl:{write("x.jsonl", b" ")}', 'x.jsonl is empty')
    path = write('x.jsonl.gz', gzip.compress(good * 99)[:-12])
    fails(f'jsonl:{path}', 'x.jsonl.gz is no whole gzip file')
    fails(f'jsonl:{write("y.jsonl.gz", good)}', 'y.jsonl.gz is no whole gzip file')


def test_a_bomb_stops_early(write, monkeypatch):
    monkeypatch.setattr(raw, 'ALWAYS', 2**22)
    packed = gzip.compress(b'{"prompt": "' + bytes(2**25))
    read_pieces = []
    whole = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile,
        'read',
        lambda *a: read_pieces.append(whole(*a)) or read_pieces[-1],
    )
    path = write('x.jsonl.gz', packed)
    fails(f'jsonl:{path}', f'{path} unpacks to more than', 'unpack it first')
    assert sum(map(len, read_pieces)) < 2**24
    # Monotonous data that is meant.
    data = lines(*({'prompt': 'the same', 'completion': 'again'} for _ in range(9999)))
    assert len(read(f'jsonl:{write("y.jsonl.gz", gzip.compress(data))}')) == 9999


def test_a_parquet_bomb_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, 'ALWAYS', 2**22)
    path = tmp_path / 'x.parquet'
    text = pa.array([0] * 5000).dictionary_encode()
    text = pa.DictionaryArray.from_arrays(text.indices, pa.array(['so ' * 3000]))
    parquet.write_table(pa.table({'prompt': text.cast(pa.string())}), path)
    fails(f'parquet:{path}', 'x.parquet unpacks to more than')


def test_records_that_are_nested_too_deep(write):
    for depth in (101, 3000, 100_000):
        text = '{"a": ' + '[' * depth + ']' * depth + '}'
        path = write('x.jsonl', lines({'a': 1}) + text.encode())
        fails(f'jsonl:{path}', f'{path}:2: nested more than 100 deep')
    wide = lines({'a': [[1]] * 5000})
    assert read(f'jsonl:{write("x.jsonl", wide)}')[0].fields == {'a': [[1]] * 5000}


def test_a_number_of_thousands_of_digits(write):
    path = write('x.jsonl', b'{"a": ' + b'9' * 5000 + b'}')
    fails(f'jsonl:{path}', f'{path}:1: not JSON that can be read')


def test_paths_that_cannot_be(tmp_path):
    for kind in ('jsonl', 'parquet', 'text', 'hh'):
        fails(f'{kind}:~nouser/x', "'~nouser/x' cannot be looked up", 'home directory')
        fails(f'{kind}:{tmp_path}/{"x" * 999}', 'looked up (File name too long)')
        fails(f'{kind}:{tmp_path}/a\0b', 'looked up (it holds a zero byte)')
    fails('jsonl:/dev/null', 'is a device or a pipe')
    file = tmp_path / 'file'
    file.write_text('x')
    fails(f'jsonl:{file}/below.jsonl', 'does not exist')


@pytest.mark.parametrize('head', list(raw.BINARY))
def test_a_binary_file_is_named(write, head):
    fails(f'jsonl:{write("x.jsonl", head + bytes(99))}', 'x.jsonl is no text, but')


def test_damaged_parquet(tmp_path):
    path = tmp_path / 'x.parquet'
    table = pa.table({'a': [f'text number {i}' for i in range(3000)]})
    how = dict(use_dictionary=False, compression='none')
    parquet.write_table(table, path, **how)
    data = bytearray(path.read_bytes())
    data[data.index(b'number 2000')] = 0xFF
    path.write_bytes(data)
    fails(f'parquet:{path}', f'{path}:2001: the row is damaged', 'Invalid UTF8')
    parquet.write_table(table, path, write_page_checksum=True, **how)
    data = bytearray(path.read_bytes())
    data[data.index(b'number 2000')] = ord('m')  # still a text
    path.write_bytes(data)
    fails(f'parquet:{path}', f'{path} is no readable Parquet file', 'CRC')
    path.write_bytes(data[: len(data) // 2])
    fails(f'parquet:{path}', f'{path} is no readable Parquet file')


def test_parquet(tmp_path, write):
    path = tmp_path / 'x.parquet'
    parquet.write_table(pa.table({'a': ['é', None], 'b': [1.5, 2.5]}), path)
    records = read(f'parquet:{path}')
    assert [r.fields for r in records] == [{'a': 'é', 'b': 1.5}, {'a': None, 'b': 2.5}]
    assert records[1].where == f'{path}:2'
    fails(f'parquet:{write("y.parquet", b"PAR1 no")}', 'y.parquet', 'no readable')
    parquet.write_table(pa.table({'a': pa.array([], pa.string())}), path)
    fails(f'parquet:{path}', 'x.parquet is empty')


def test_text_documents_are_stripped_and_placed(write):
    data = 'one\ntwo\n<|endoftext|>\n\nthree é\n<|endoftext|>\n<|endoftext|>four\n'
    path = write('x.txt', data.encode())
    records = read(f'text:{path}')
    assert [r.fields['text'] for r in records] == ['one\ntwo', 'three é', 'four']
    # Lines: 1 one, 2 two, 3 separator, 4 blank, 5 three, 6 and 7 separators.
    assert [r.where for r in records] == [f'{path}:1', f'{path}:5', f'{path}:7']


def test_text_directory(write, tmp_path):
    write('b.txt', b'second')
    write('a.txt', b'first<|endoftext|>more')
    write('c.md', b'no')
    texts = [r.fields['text'] for r in read(f'text:{tmp_path}')]
    assert texts == ['first', 'more', 'second']
    assert len(read(f'text:{tmp_path}[:2]')) == 2


def test_bad_text(write):
    path = write('x.txt', b'one\ntwo\nth\xffree')
    fails(f'text:{path}', f'{path}:3: byte 0xff is not UTF-8')
    fails(f'text:{write("y.txt", b"<|endoftext|> ")}', 'y.txt is empty')


def test_transcripts_split_at_the_last_shared_turn():
    head = '\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:'
    # The answers share their first letters, which belong to them and not to the prompt.
    assert split_transcripts(head + ' so long', head + ' so what') == (
        head,
        ' so long',
        ' so what',
    )
    # A turn that only one of them has stays in its answer.
    longer = head + ' a\n\nHuman: b\n\nAssistant: c'
    assert split_transcripts(longer, head + ' a')[:2] == (
        head,
        ' a\n\nHuman: b\n\nAssistant: c',
    )
    assert split_transcripts('\n\nHuman: x', '\n\nHuman: y')[0] == ''


def test_hh_keeps_other_fields_and_leaves_odd_ones(write):
    rows = lines(
        {'chosen': 'H\n\nAssistant: a', 'rejected': 'H\n\nAssistant: b', 'id': 3},
        {'chosen': 1, 'rejected': 'x'},
    )
    first, second = read(f'hh:{write("x.jsonl", rows)}')
    assert first.fields == {
        'prompt': 'H\n\nAssistant:',
        'chosen': ' a',
        'rejected': ' b',
        'id': 3,
    }
    assert second.fields == {'chosen': 1, 'rejected': 'x'}


def test_all_of_hh_harmless():
    path = SHARED / 'hh_rlhf_harmless' / 'test.jsonl.gz'
    if not path.exists():
        pytest.skip(f'{path} is not here')
    records = read(f'hh:{path}')
    fields = [r.fields for r in records]
    assert len(fields) == 2312
    assert all(f['prompt'].endswith('\n\nAssistant:') for f in fields)
    assert all(f['prompt'].startswith('\n\nHuman:') for f in fields)
    assert not any(f['chosen'] == f['rejected'] for f in fields)
    empty = [r.where for r in records if not r.fields['chosen'].strip()]
    assert empty == [f'{path}:{n}' for n in (87, 517, 926, 1104)]
    assert all(f['rejected'].strip() for f in fields)
    with gzip.open(path, 'rt', encoding='utf-8') as file:
        originals = [json.loads(line) for line in file]
    for field, original in zip(fields, originals):  # nothing is lost or doubled
        assert field['prompt'] + field['chosen'] == original['chosen']
        assert field['prompt'] + field['rejected'] == original['rejected']


FUNCTIONS = """
def rows(count, word='a b'):
    for i in range(int(count)):
        yield {'text': f'{word}{i}'}

def numbers():
    return [{'text': 'x'}, 3]

def one():
    return 1

def broken():
    return {}[0]

def keys():
    return [{'prompt': {7: 'x'}}]

def digits():
    return [{'margin': 10**5000}]

def deep():
    row = {}
    row['row'] = row
    return [row]
"""


def test_python_function(tmp_path, monkeypatch):
    (tmp_path / 'my_records.py').write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    records = read('python:my_records:rows?count=10&word=x%3F%5B%26')
    assert [r.fields['text'] for r in records] == [f'x?[&{i}' for i in range(10)]
    assert records[4].where == 'my_records:rows record 5'
    half = read('python:my_records:rows?count=10&word=c/d:e[50%:]')
    assert [r.fields['text'] for r in half] == [f'c/d:e{i}' for i in range(5, 10)]
    assert half[0].where == 'my_records:rows record 6'
    assert read('python:my_records:rows?count=1')[0].fields == {'text': 'a b0'}
    spec = 'python:my_records:rows'
    fails(spec, "missing a required argument: 'count'", "(count, word='a b')")
    fails(f'{spec}?count=1&wrod=x', "unexpected keyword argument 'wrod'")
    fails(f'{spec}?count=1&count=2', 'count=2: an argument is given twice')
    fails(f'{spec}?count', 'write ?key=value')
    fails(f'{spec}?count=0', 'gave no records')
    fails(f'{spec}?count=3[:7]', 'asks for 7', 'there are 3 records')
    fails('python:my_records:row?count=3', 'cannot be imported', "'row'")
    fails('python:my_record:rows', 'cannot be imported', "'my_record'")
    fails('python:my_records:one', 'gave a int', 'iterable of dicts')
    fails('python:my_records:numbers', 'my_records:numbers record 2: a int, not a dict')
    fails('python:my_records:broken', 'failed with KeyError: 0', 'my_records.py:13')
    fails('python:my_records:keys', 'keys record 1: the key 7 is no text')
    fails('python:my_records:digits', 'record 1: a number of thousands of digits')
    fails('python:my_records:deep', 'my_records:deep record 1: nested more than 100')


def test_a_stream_is_read_at_every_pass(tmp_path, write, monkeypatch):
    module = tmp_path / 'counted.py'
    module.write_text(
        'calls = []\n'
        'def rows(n="4"):\n'
        '    calls.append(n)\n'
        '    return ({"text": str(i), "none": None} for i in range(int(n)))\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write('x.jsonl', lines(*({'text': str(i), 'none': None} for i in range(4))))
    for spec in (f'jsonl:{path}', 'python:counted:rows'):
        for end, size in (('', 4), ('[1:]', 3), ('[:50%]', 2)):
            records = stream(spec + end)
            assert list(records) == list(records) == read(spec + end)
            assert len(list(records)) == size
            assert records.field_names() == {'text'}
    assert len(sys.modules['counted'].calls) == 6  # once for a stream, once for read


def test_a_file_is_read_as_far_as_it_is_asked_for(write):
    path = write('x.jsonl', b'{"text": "a"}\nbroken')
    records = iter(stream(f'jsonl:{path}'))
    assert next(records).fields == {'text': 'a'}
    with pytest.raises(ValueError, match=':2: not JSON'):
        next(records)


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path))
    records = read('tfds:mini_source_set/one:train')
    assert len(records) == 4
    by_prompt = {r.fields['prompt']: r.fields for r in records}
    odd = {'tags': ['x', 'ü'], 'votes': [3, 7]}
    assert by_prompt['é3'] == {'prompt': 'é3', 'gold': 1.5, **odd}
    assert type(by_prompt['é3']['gold']) is float
    assert type(by_prompt['é3']['votes']) is list
    assert records[2].where == 'tfds mini_source_set/one/train 2'
    for together in (1, 3):  # four records are read in parts, the last a short one
        monkeypatch.setattr(sources, 'TOGETHER', together)
        assert read('tfds:mini_source_set/one:train') == records
    half = read('tfds:mini_source_set/one:train[:50%]')
    assert [r.fields for r in half] == [r.fields for r in records[:2]]
    assert 'tensorflow' not in sys.modules
    fails('tfds:mini_source_set/one', 'names no split', ':train')
    fails('tfds:mini_source_set/one:tset', "split 'tset' (Unknown", 'are train')
    fails('tfds:mini_source_set/one:train[:1%]', "nothing in split 'train[:1%]'")
    fails('tfds:mini_source_set/two:train', "no 'mini_source_set/two'", 'are one')
    fails('tfds:no_such_set:train', "TFDS has no 'no_such_set'")
    fails('tfds:no-such.set:train', "TFDS has no 'no-such.set'")


def test_fields_by_other_names(write):
    path = write(
        'alpaca.jsonl',
        lines(
            {'instruction': 'Add.', 'input': '1 2', 'output': '3', 'id': 7},
            {'instruction': 'Hi', 'input': '', 'output': 'Hello'},
        ),
    )
    spec = f'jsonl:{path}?prompt=instruction+input&completion=output'
    one, other = read(spec)
    assert one.fields == {'id': 7, 'prompt': 'Add.\n\n1 2', 'completion': '3'}
    assert other.fields['prompt'] == 'Hi' and other.where.endswith(':2')
    assert [r.fields for r in read(f'{spec}[1:]')] == [other.fields]
    turns = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]
    path = write('share.jsonl', lines({'conversations': turns}))
    (found,) = read(f'jsonl:{path}?messages=conversations')
    roles = [turn['role'] for turn in found.fields['messages']]
    assert roles == ['user', 'assistant']
    path = write('odd.jsonl', lines({'conversations': [{'from': 'cat', 'value': 'a'}]}))
    fails(f'jsonl:{path}?messages=conversations', ':1: a turn from', "'cat'")
    fails(f'jsonl:{path}?prompt=question', ":1: no field 'question'", 'conversations')
    fails(f'jsonl:{path}?prompt', 'write ?prompt=question')


def test_csv(write):
    path = write('x.csv', b'prompt,completion\n"a, ""b""\nc",d\ne,f\n')
    one, other = read(f'csv:{path}')
    assert one.fields == {'prompt': 'a, "b"\nc', 'completion': 'd'}
    assert other.fields == {'prompt': 'e', 'completion': 'f'}
    assert other.where == f'{path}:4'
    for text, message in (
        (b'a,b\n1,2,3\n', ':2: 3 values'),
        (b'a,a\n1,2\n', 'stands twice'),
        (b'a,b\n1,"2\n', 'no CSV'),
    ):
        fails(f'csv:{write("y.csv", text)}', message)
