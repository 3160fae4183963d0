"""Loading and saving a tokenizer, what the package demands of one, and lists of ids.

A tokenizer is a Hugging Face ``PreTrainedTokenizerFast``. It must have an EOS token,
which ends every response; it may lack BOS and pad (padding is told by masks). Read
``data/sources.py`` next.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf_jax.config import failure, load_dotted
from rlhf_jax.data import clock
from rlhf_jax.data.stops import GENERATION_CONFIG, decide_ends, eos_ids
from rlhf_jax.files import find_damage, has_checksums, named_path, write_checksums

PAD, EOS = '<|pad|>', '<|eos|>'  # of the embedded data sets
TOGETHER = 256  # texts that are tokenised in one call, by several threads


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and checks that it can end a text and leave a prompt open.

    Args:
        spec: a Hugging Face directory, a hub name, or ``'package.module:function'``, a
            function without arguments that returns a tokenizer.

    Raises:
        ValueError: nothing can be loaded there, it is no fast tokenizer, it has no EOS
            token, or it appends tokens to every text.
    """
    tokenizer = _load_fast(spec)
    decide_ends(tokenizer)
    eos_ids(tokenizer)
    bos_ids(tokenizer)
    return tokenizer


def load_scoring_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a reward model, which reads texts that are over: unlike
    that of a policy it may append a token to each (BERT's ``[SEP]``).

    Raises:
        ValueError: as :func:`load_tokenizer` and :func:`frame` do.
    """
    tokenizer = _load_fast(spec)
    decide_ends(tokenizer)
    frame(tokenizer)
    return tokenizer


def stage_tokenizer(stage_dir: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a finished stage: its own, or that of its run; None for a stage
    folder that stands by itself.

    Raises:
        ValueError: it is damaged, or as :func:`load_scoring_tokenizer` does.
    """
    own, common = stage_dir / 'tokenizer', stage_dir.parent / 'tokenizer'
    if own.exists():  # the checksums of the stage cover it
        return load_scoring_tokenizer(str(own))
    if common.exists():
        _check_whole(common, 'SPEC')
        return load_scoring_tokenizer(str(common))
    return None


def _load_fast(spec: str) -> PreTrainedTokenizerBase:
    try:
        folder = named_path(spec)
    except ValueError as error:
        raise ValueError(f'tokenizer={error}') from error
    if ':' in spec and not folder.exists():
        function = load_dotted(spec, 'tokenizer')
        try:
            tokenizer = function()
        except Exception as error:
            raise ValueError(f'tokenizer={spec!r} fails: {failure(error)}') from error
    else:
        name = str(folder) if folder.exists() else spec
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # the parser of tokenizer.json raises no other
            reason = str(error).strip().splitlines()[:1]
            if (folder / 'tokenizer.json').exists():
                raise ValueError(
                    f'tokenizer={spec!r} cannot be loaded: tokenizer.json or '
                    'tokenizer_config.json in it is damaged '
                    f'({type(error).__name__}: {"".join(reason)}); fetch it again'
                ) from error
            raise ValueError(
                f'tokenizer={spec!r} cannot be loaded: it is neither a directory with '
                f'tokenizer files nor a hub name that can be reached '
                f'({"".join(reason)}); give a directory, a hub name or '
                'package.module:function'
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ValueError(
            f'tokenizer={spec!r} gives a {type(tokenizer).__name__}; a '
            'PreTrainedTokenizerFast is needed'
        )
    try:
        tokenizer.decode(tokenizer('a', return_offsets_mapping=True)['input_ids'])
    except Exception as error:  # an entry of its files that is no setting
        raise ValueError(
            f'tokenizer={spec!r} cannot be used: an entry of its files is damaged '
            f'({type(error).__name__}: {error}); fetch it again'
        ) from error
    clock.restore_date(tokenizer, folder)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a directory that loads as the same tokenizer, with the same EOS ids and
    the date of the run, and has
    checksums.
    """
    tokenizer.save_pretrained(folder)
    clock.save_date(tokenizer, folder)
    text = json.dumps({'eos_token_id': eos_ids(tokenizer)}) + '\n'
    (folder / GENERATION_CONFIG).write_text(text, encoding='utf-8')
    write_checksums(folder, 'tokenizer')


def _check_whole(folder: Path, spec: str) -> None:
    """Raises ValueError where the files are not those that were written, and says how
    they are written anew from ``spec``.
    """
    damage = None
    if not folder.is_dir():
        damage = 'it is missing'
    elif has_checksums(folder):
        damage = find_damage(folder, 'tokenizer')
    if damage is not None:
        raise ValueError(f'{folder} is damaged ({damage}); {_rewrite(folder, spec)}')


def _rewrite(folder: Path, spec: str) -> str:
    code = (
        'from pathlib import Path; from rlhf_jax.data.tokenizer import load_tokenizer, '
        'save_tokenizer; '
        f'save_tokenizer(load_tokenizer({spec!r}), Path({str(folder)!r}))'
    )
    place = shlex.quote(str(folder))
    where = ', where SPEC is its `tokenizer` in config.json' if spec == 'SPEC' else ''
    return f'write it anew with `rm -rf {place}; python -c {shlex.quote(code)}`{where}'


def check_saved(tokenizer: PreTrainedTokenizerBase, folder: Path, spec: str) -> None:
    """Checks that a run that was begun with the tokenizer in ``folder`` may go on.

    Args:
        tokenizer: of the run now.
        folder: where the run keeps its own.
        spec: that ``tokenizer`` was loaded from.

    Raises:
        ValueError: what is in ``folder`` is damaged or missing, or differs from
            ``tokenizer`` in what a model would notice.
    """
    _check_whole(folder, spec)
    try:
        saved = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing more special
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f'{folder} cannot be read ({"".join(reason)}); {_rewrite(folder, spec)}'
        ) from error
    decide_ends(saved)
    differing = [
        name
        for name, trait in {
            'vocabulary': lambda t: t.get_vocab(),
            'special tokens': lambda t: t.special_tokens_map,
            'chat template': lambda t: t.chat_template,
            'tokens before a text': bos_ids,
            'EOS ids': eos_ids,
        }.items()
        if trait(saved) != trait(tokenizer)
    ]
    if differing:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} is not the one that the run was '
            f'begun with, which is in {folder}: they differ in {", ".join(differing)}; '
            'go back to that one, or use another --workdir'
        )


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before every text; usually BOS or nothing.

    Raises:
        ValueError: the tokenizer also puts tokens behind a text: a prompt that is to be
            continued must stay open.
    """
    before, behind = _around(tokenizer)
    if behind:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} appends '
            f'{tokenizer.convert_ids_to_tokens(behind)} to every text, but a prompt '
            'must stay open; take that out of the post_processor in its tokenizer.json '
            '(a LlamaTokenizer or the like makes its own: there, set '
            'add_eos_token=false in tokenizer_config.json)'
        )
    return before


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The ids that stand before a text that is over, and the id that ends it: what the
    tokenizer puts behind every text, or EOS where it puts nothing there.

    Raises:
        ValueError: it puts several tokens behind a text, or nothing and has no EOS.
    """
    before, behind = _around(tokenizer)
    if len(behind) > 1:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} appends '
            f'{tokenizer.convert_ids_to_tokens(behind)} to every text; at most one '
            'token can end it'
        )
    return before, (behind or eos_ids(tokenizer))[0]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bare = tokenizer.encode('a', add_special_tokens=False)
    full = tokenizer.encode('a')
    num_special = len(full) - len(bare)
    before = next(i for i in range(num_special + 1) if full[i : i + len(bare)] == bare)
    return full[:before], full[before + len(bare) :]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens, as they are spelt, with their ids: EOS and the like, and what
    else a chat template controls a model with.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: i for i, token in added if token.special}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that a model with ``vocab_size`` embeddings has one for every token.

    Raises:
        ValueError: the tokenizer has higher ids.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise ValueError(
            f'token {token!r} has id {highest}, the model has {vocab_size} embeddings '
            f'(0 to {vocab_size - 1}); use the tokenizer the model was trained with, '
            f'or a model with at least {highest + 1}'
        )


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, plain: bool = False
) -> list[list[int]]:
    """Ids of whole texts, with nothing added and nothing cut; ``plain`` writes what is
    spelt like a special token as any other text.
    """
    backend, split = (
        tokenizer.backend_tokenizer,
        plain or tokenizer.split_special_tokens,
    )
    # What a tokenizer.json may ask for, or an earlier call has set.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != split:
        backend.encode_special_tokens = split
    rows: list[list[int]] = []
    for start in range(0, len(texts), TOGETHER):
        part = texts[start : start + TOGETHER]
        found = backend.encode_batch_fast(part, add_special_tokens=False)
        rows += [encoding.ids for encoding in found]
    return rows


def encode_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Ids of a whole text, as :func:`encode`, and which of them reach into a span.

    Args:
        tokenizer: a fast one.
        text: any.
        spans: (first character, character behind the last), ascending and disjoint.
    """
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    inside = [
        any(begin < end and stop > start for start, end in spans)
        for begin, stop in encoding['offset_mapping']
    ]
    return encoding['input_ids'], inside


def opened(ids: list[int], bos: list[int]) -> list[int]:
    """Ids with BOS before them, once."""
    return ids if ids[: len(bos)] == bos else bos + ids


def truncate(
    prompt: list[int],
    answers: list[list[int]],
    limit: int,
    bos: list[int],
    eos: int | None,
) -> tuple[list[int], list[list[int]]]:
    """Cuts a prompt and its answers so that each fits with it into ``limit`` tokens.

    The prompt is cut first, from the left, down to half of ``limit`` at most (to all of
    it where there is no answer); an answer too long even so is cut from the right.

    Args:
        prompt: ids; ``bos`` at their beginning stays.
        answers: ids that end in ``eos``, which stays.
        limit: tokens of the prompt and the longest answer together.
        bos: ids that may stand before a text; may be none.
        eos: the id that ends every answer; None for no such id.

    Returns:
        (prompt, answers).
    """
    longest = max(map(len, answers), default=0)
    room = max(limit - longest, limit // 2) if answers else limit
    if len(prompt) > room:
        bos = bos if prompt[: len(bos)] == bos else []
        prompt = bos + prompt[len(prompt) - (room - len(bos)) :]
    space, end = limit - len(prompt), [] if eos is None else [eos]
    return prompt, [
        a if len(a) <= space else a[: space - len(end)] + end for a in answers
    ]


def learn_words(corpus: Iterable[str], *, split_digits: bool = False) -> list[str]:
    """The words of a small corpus, for :func:`word_tokenizer`, sorted.

    They are spelt in bytes and with their leading space, as the ``tokenizers`` trainer
    has them; a word that stands in the texts less than ten times is left out, being an
    accident of cut and stuttering texts.

    Args:
        corpus: texts.
        split_digits: as for :func:`word_tokenizer`.
    """
    counter = tokenizers.Tokenizer(models.WordLevel())
    counter.pre_tokenizer = _split(split_digits)
    trainer = trainers.WordLevelTrainer(min_frequency=10, show_progress=False)
    counter.train_from_iterator(corpus, trainer)
    return sorted(counter.get_vocab())


def word_tokenizer(
    words: Iterable[str], *, split_digits: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which every word of a small vocabulary is one token.

    The 256 bytes and two special tokens stand before the words. A word is taken whole
    (``ignore_merges``) and any other text falls back to its bytes: encoding loses
    nothing. Learned merges would spend a small vocabulary on the pieces of words.

    Args:
        words: as :func:`learn_words` gives them.
        split_digits: every digit is a token of its own, and the space before a number
            is one.

    Returns:
        A tokenizer with pad and EOS and without BOS; ids 0 and 1 are the special
        tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([PAD, EOS, *alphabet, *words])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)
    )
    backend.pre_tokenizer = _split(split_digits)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _split(digits: bool) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not digits:
        return split
    single = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([single, split])
